"""The real command line in miniature, and the arithmetic of its schedule."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import NOT_REPEATABLE, TINY, TINY_DIM, build_tiny, run_finetune, run_tiny, scalars, tiny_config
from PIL import Image
from segment_anything import SamPredictor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import checkpoint
import finetune
import inference
import losses
import resume
import runtime
from base.errors import UserError
from config import load_config
from embeddings import encode_test_set
from evaluation import evaluate
from imaging.metrics import compute_stats
from sam import decoder, encoder, trainable, variants
from train_config import parse_args
from train_state import learning_rate

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Runs write to exp/ of the current directory."""
    monkeypatch.chdir(tmp_path)


# --- whole runs ---


def check_tensorboard(folder):
    """What TensorBoard shows beside the curves: table of runs, images, texts."""
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    start = HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    assert start.session_start_info.hparams["lr"].number_value == 5e-3
    experiment = HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    )
    names = [info.name for info in experiment.experiment.hparam_infos]
    assert names[:2] == ["train", "model_type"] and len(names) == len(set(names)) > 20
    assert set(tags["images"]) == {"test/panel", "test/worst_and_median", "train/panel"}
    assert set(tags["tensors"]) == {"flags/text_summary", "test/pixels", "custom_scalars__config__"}


def test_a_miniature_run_learns_and_writes_what_it_promises(tiny_weights, config_file, capsys, data):
    config = config_file(percentage=8.0, w_aug=False)
    code = run_tiny(
        config, tiny_weights, "--epoch_num", 8, "--batch_size", 8, "--lr", 5e-3, "--save_interval", 4,
        "--test_interval", 12, "--log_interval", 6, "--num_workers", 2,
    )  # fmt: skip
    assert code == 0
    folder = Path("exp/run")
    curves = scalars(folder)
    assert set(curves) == {
        "train/loss", "train/focal", "train/dice", "train/iou_mse", "train/lr", "train/bad_steps",
        "train/images_per_s", "train/data_wait", "test/iou", "test/dice", "test/precision", "test/recall",
        "test/boundary_iou", "test/cldice", "test/total_iou", "test/recall_thin",
        "test/recall_thick", "test/best_threshold", "test/best_iou", "best/iou", "best/dice", "best/cldice",
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["iteration"], pytest.approx(line["iou"])) for line in lines] == curves["test/iou"]
    assert all(
        curves[f"test/{name}"][-1] == (48, pytest.approx(lines[-1][name]))
        for name in lines[-1].keys() - {"iteration"}
    )
    losses, ious = ([value for _, value in curves[tag]] for tag in ("train/loss", "test/iou"))
    assert np.mean(losses[-2:]) < 0.7 * losses[0]
    assert max(ious) > ious[0] + 0.2
    assert [step for step, _ in curves["test/iou"]] == [0, 12, 24, 36, 48]
    assert [step for step, _ in curves["train/loss"]] == list(range(6, 49, 6))
    expected = 20 * curves["train/focal"][0][1] + curves["train/dice"][0][1] + curves["train/iou_mse"][0][1]
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert curves["train/lr"][0][1] == pytest.approx(5e-3 * 6 / 10, rel=1e-4)
    assert all(0 <= share <= 1 for _, share in curves["train/data_wait"])

    check_tensorboard(folder)
    assert curves["best/iou"][-1][1] == max(ious)
    files = {path.name for path in (folder / "checkpoints").glob("*.pth")}
    assert files == {"epoch_0004.pth", "epoch_0008.pth", "best.pth", "last.pth"}
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["lr"] == 5e-3 and args["prompt"] == "none" and args["config"] == str(config)
    again = yaml.safe_load((folder / "config.yaml").read_text())
    assert again["dataset"]["train"][0]["data_dir"] == str(data / "cables")
    load_config(folder / "config.yaml")

    output = capsys.readouterr().out
    assert "8 epochs of 48 samples: 48 iterations, 48 optimizer steps" in output
    assert f"baseline -> fine-tuned: IoU {ious[0]:.4f} -> {max(ious):.4f}" in output
    assert "exp/run/checkpoints/best.pth" in output


def test_the_checkpoint_is_a_plain_sam_and_predicts_the_same(tiny_weights, config_file, data):
    assert run_tiny(config_file(), tiny_weights, "-e", 10, "--lr", 1e-2) == 0
    fresh = build_tiny()
    fresh.load_state_dict(torch.load("exp/run/checkpoints/last.pth", weights_only=True), strict=True)
    predictor = SamPredictor(fresh)

    last = Path("exp/run/checkpoints/last.pth")
    experiment = finetune.prepare(tiny_config(config_file(), last))
    tests = encode_test_set(
        experiment.test_set, experiment.net, batch_size=2, num_workers=0, stop=runtime.StopRequest()
    )
    ours = [logits > 0 for _, logits in evaluate(experiment.net, tests, 2)]
    assert any(mask.any() for mask in ours)
    for mask, test in zip(ours, tests, strict=True):
        predictor.set_image(test.thumbnail)
        official, _, _ = predictor.predict(multimask_output=False)
        assert (official[0] == mask).all()


@pytest.mark.parametrize("train", ["decoder", "lora", "encoder"])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_what_trains_is_saved_under_the_official_keys(tiny_weights, config_file, train, amp):
    options = ("-e", 3, "--lr", 1e-2, "--train", train, "--amp", amp, "--prompt", "mixed")
    assert run_tiny(config_file(), tiny_weights, *options) == 0
    before = checkpoint.load_weights(tiny_weights)
    after = checkpoint.load_weights(Path("exp/run/checkpoints/last.pth"))
    build_tiny().load_state_dict(after, strict=True)
    assert all(after[key].dtype == before[key].dtype for key in before)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    encoder_keys = {key for key in before if key.startswith("image_encoder.")}
    projections = {key for key in encoder_keys if re.search(r"(attn\.(qkv|proj)|mlp\.lin[12])\.weight$", key)}
    assert len(projections) == 8
    expected = {"decoder": set(), "lora": projections, "encoder": encoder_keys}
    assert changed & encoder_keys == expected[train]
    assert any(key.startswith("mask_decoder.") for key in changed)
    assert not any(key.startswith("prompt_encoder.") for key in changed)


@pytest.mark.parametrize(("train", "side"), [("decoder", 32), ("lora", 64), ("encoder", 64)])
def test_the_loss_is_finer_where_the_encoder_trains(tiny_weights, config_file, at_iteration, train, side):
    shapes = []
    at_iteration(range(99), lambda batch, net: shapes.append(tuple(batch["target"].shape[2:])))
    assert run_tiny(config_file(), tiny_weights, "-e", 1, "--train", train) == 0
    assert shapes and set(shapes) == {(side, side)}


@pytest.mark.parametrize("train", ["lora", "encoder"])
def test_a_trained_encoder_is_tested_as_it_is(tiny_weights, config_file, train):
    options = ("-e", 8, "--lr", 1e-2, "--train", train, "--test_interval", 5)
    assert run_tiny(config_file(w_aug=False), tiny_weights, *options) == 0
    in_the_run = scalars("exp/run")["test/iou"][-1][1]
    last = Path("exp/run/checkpoints/last.pth")
    assert run_tiny(config_file(w_aug=False), last, "-e", 1, "-n", "again") == 0
    assert in_the_run > 0.05
    assert scalars("exp/again")["test/iou"][0] == (0, pytest.approx(in_the_run, abs=0.01))


def tensors_in_memory(sam):
    """Every parameter and buffer of the model by its name, without the adapters of --train lora."""
    tensors = dict([*sam.named_parameters(), *sam.named_buffers()])
    return {name.replace(".base_layer", ""): value for name, value in tensors.items() if ".lora_" not in name}


def train_in_memory(config):
    """Train, and return the names of what trains, of what changed, and of everything."""
    experiment = finetune.prepare(config)
    sam = experiment.net.sam
    before = {name: tensor.detach().clone() for name, tensor in tensors_in_memory(sam).items()}
    finetune.make_folder(experiment)
    finetune.run_training(experiment.config, experiment, runtime.StopRequest())
    after = tensors_in_memory(sam)
    assert after.keys() == before.keys()
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    trains = {name for name, tensor in after.items() if tensor.requires_grad}
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    return trains, changed, set(before)


def build_tiny_with_batch_norm():
    sam = build_tiny()
    sam.image_encoder.neck.append(torch.nn.BatchNorm2d(TINY_DIM))
    return sam.eval()


@pytest.mark.parametrize("train", ["decoder", "lora", "encoder"])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_frozen_modules_do_not_move_in_memory(tiny_weights, config_file, monkeypatch, train, amp):
    monkeypatch.setitem(variants.VARIANTS, "tiny", replace(TINY, build=build_tiny_with_batch_norm))
    checkpoint.save_weights(build_tiny_with_batch_norm().state_dict(), tiny_weights)
    flags = ("-e", 3, "--lr", 1e-2, "--train", train, "--amp", amp, "--prompt", "mixed")
    trains, changed, names = train_in_memory(tiny_config(config_file(), tiny_weights, *flags))
    frozen = re.compile(
        r"mask_decoder\.output_hypernetworks_mlps\.[123]\.|image_encoder\.neck\.4\.(running|num)"
    )
    part = ("mask_decoder.", "image_encoder.") if train == "encoder" else ("mask_decoder.",)
    assert trains == {name for name in names if name.startswith(part) and not frozen.match(name)}
    assert changed <= trains and len(changed) > 0.9 * len(trains)
    assert sum(bool(frozen.match(name)) for name in names) == 3 * 6 + 3  # 3 layers a head; the statistics


def test_accumulation_equals_one_big_batch(tiny_weights, config_file, monkeypatch):
    # Plain gradient descent shows gradients as they are; Adam would hide their scale.
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, **_: torch.optim.SGD(params, lr=1.0))
    results = {}
    config = config_file(percentage=7 / 6)  # 7 samples: batches of 4 and 3, or of 2, 2 | 2, 1
    options = ("-e", 2, "--lr", 0.05, "--warmup_steps", 0, "--prompt", "point", "--grad_clip", 1e6)
    for name, batch, virtual in (("big", 4, 1), ("accumulated", 2, 2), ("wrong", 2, 1)):
        assert run_tiny(config, tiny_weights, *options, "-b", batch, "--virtual_batch_size", virtual) == 0
        results[name] = checkpoint.load_weights(Path("exp/run/checkpoints/last.pth"))
        shutil.rmtree("exp/run")
    start = checkpoint.load_weights(tiny_weights)
    moved = [key for key in start if not torch.equal(start[key], results["big"][key])]
    assert len(moved) > 20

    def distance(name):
        return max((results[name][key] - results["big"][key]).abs().max().item() for key in moved)

    assert distance("accumulated") < 1e-5 < distance("wrong")


def test_a_run_is_repeatable_and_independent_of_workers(tiny_weights, config_file):
    results = []
    for workers in (0, 2):
        assert (
            run_tiny(config_file(), tiny_weights, "-e", 2, "--prompt", "mixed", "--num_workers", workers) == 0
        )
        results.append(checkpoint.load_weights(Path("exp/run/checkpoints/last.pth")))
        shutil.rmtree("exp/run")
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def train_naively(*argv):
    """The least code that trains: no loader, no cache, no pool, no accumulation, one precision."""
    config = parse_args([str(part) for part in argv])
    experiment = finetune.prepare(config)
    sam, train_set = experiment.net.sam, experiment.train_set
    parameters = trainable.freeze(sam)
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
    batches = [
        keys
        for epoch in range(config.epoch_num)
        for keys in train_set.epoch_batches(epoch, batch_size=config.batch_size)
    ]
    for step, keys in enumerate(batches):
        samples = [train_set[key] for key in keys]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        embeddings = encoder.encode(sam, batch["image"], batch["size"], config.model_type)
        logits, iou_pred = decoder.decode(sam, embeddings, batch["points"], batch["labels"])
        target, valid = batch["target"] / 255, encoder.valid_pixels(batch["size"], 32, 0.5)
        focal = losses.focal_loss(logits, target, valid, alpha=config.alpha, gamma=config.gamma)
        dice = losses.dice_loss(logits, target, valid)
        iou = losses.iou_mse(iou_pred, logits, target, valid)
        ((20 * focal.sum() + dice.sum() + iou.sum()) / len(keys)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step,
                total_steps=len(batches),
                peak=config.lr,
                warmup=config.warmup_steps,
                power=config.lr_power,
            )
        optimizer.step()
        optimizer.zero_grad()
    return trainable.export_state_dict(sam, experiment.initial_state_dict)


def test_cldice_counts_with_its_weight(tiny_weights, config_file):
    for name, weight in (("without", 0), ("with", 2.5)):
        flags = ("--cldice_weight", weight, "--epoch_num", 1, "--log_interval", 1, "--exp_name", name)
        assert run_tiny(config_file(), tiny_weights, *flags) == 0
    without, curves = scalars(Path("exp/without")), scalars(Path("exp/with"))
    assert "train/cldice" not in without
    (_, first), (_, cldice) = curves["train/loss"][0], curves["train/cldice"][0]
    assert 0 < cldice < 1  # on the same weights
    assert first == pytest.approx(without["train/loss"][0][1] + 2.5 * cldice, rel=1e-4)
    assert curves["train/focal"][1] != without["train/focal"][1]  # and it is learned from


@pytest.mark.filterwarnings("ignore:test images are also")
@pytest.mark.parametrize("options", [(), ("--embedding_reuse", 3)])
@pytest.mark.parametrize("kind", ["composites", "photos", "both"])
def test_nothing_kept_changes_what_is_learned(tiny_weights, config_file, data, kind, options):
    config = config_file()
    if kind != "composites":
        document = yaml.safe_load(config.read_text())
        photos = {"data_dir": "test", "percentage": 0.7}
        document["dataset"]["train"] = (
            [photos] if kind == "photos" else [*document["dataset"]["train"], photos]
        )
        config.write_text(yaml.safe_dump(document))
    argv = (
        "--config", config, "--model_type", "tiny", "--checkpoint", tiny_weights, "--exp_name", "run",
        "--device", "cpu", "--amp", "off", "-b", 3, "-e", 5, "--lr", 1e-2, "--prompt", "mixed", *options,
    )  # fmt: skip
    plain = train_naively(*argv, "--num_workers", 0, "--cache_mb", 0)
    assert run_finetune(*argv, "--num_workers", 2) == 0
    ours = checkpoint.load_weights(Path("exp/run/checkpoints/last.pth"))
    assert all(torch.equal(plain[key], ours[key]) for key in plain)
    assert not torch.equal(
        plain["mask_decoder.iou_token.weight"],
        checkpoint.load_weights(tiny_weights)["mask_decoder.iou_token.weight"],
    )


@pytest.mark.parametrize(("reuse", "encoded"), [(1, 6 * 8), (4, 6 + 6 * 7 / 4)])
def test_reuse_saves_encoding(tiny_weights, config_file, monkeypatch, capsys, reuse, encoded):
    image_counts = []
    encode = inference.encode

    def counted(sam, images, *args, **options):
        image_counts.append(len(images))
        return encode(sam, images, *args, **options)

    monkeypatch.setattr(inference, "encode", counted)
    config = config_file(with_test=False)
    assert run_tiny(config, tiny_weights, "-e", 8, "-b", 2, "--embedding_reuse", reuse) == 0
    assert abs(sum(image_counts) - encoded) < 2
    assert ("MiB on disk until the end" in capsys.readouterr().out) == (reuse > 1)
    assert {path.name for path in Path("exp/run").iterdir() if "tfevents" not in path.name} == {
        "args.yaml", "config.yaml", "checkpoints", "resume.pth", "report.html",
    }  # fmt: skip


def test_fp16_trains_with_a_scaler_and_resumes_it(tiny_weights, config_file):
    options = ("--amp", "fp16", "--prompt", "mixed", "--lr", 1e-2, "--save_interval", 1)
    assert run_tiny(config_file(), tiny_weights, *options, "-e", 2) == 0
    before, after = (
        checkpoint.load_weights(path) for path in (tiny_weights, Path("exp/run/checkpoints/last.pth"))
    )
    key = "mask_decoder.iou_token.weight"
    assert after[key].isfinite().all() and not torch.equal(before[key], after[key])
    state = resume.load_resume_state(Path("exp/run/resume.pth"))["train_state"]["scaler"]
    assert state["scale"] > 1 and state["_growth_tracker"] == 4
    assert run_tiny(config_file(), tiny_weights, *options, "-e", 3, "--resume") == 0
    state = resume.load_resume_state(Path("exp/run/resume.pth"))["train_state"]["scaler"]
    assert state["_growth_tracker"] == 6


def test_whole_batches_run_compiled_and_the_last_one_as_it_is(tiny_weights, config_file, monkeypatch):
    assert run_tiny(config_file(), tiny_weights, "-e", 2, "-b", 4) == 0
    expected = checkpoint.load_weights(Path("exp/run/checkpoints/last.pth"))
    shutil.rmtree("exp/run")
    sizes = {"_call_impl": [], "decode": []}

    def compile(function, **options):
        assert options == {"dynamic": False}
        seen = sizes[function.__name__]
        return lambda *args: seen.append(len(args[-1])) or function(*args)

    monkeypatch.setattr(torch, "compile", compile)
    assert run_tiny(config_file(with_test=False), tiny_weights, "-e", 2, "-b", 4, "--compile", "on") == 0
    assert sizes["decode"] == [4] * 2  # of the batches of 4, 2, 4, 2
    assert sizes["_call_impl"] == [1] * 12  # a CPU encodes one image at a time
    compiled = checkpoint.load_weights(Path("exp/run/checkpoints/last.pth"))
    assert all(torch.equal(expected[key], compiled[key]) for key in expected)


def test_compiling_is_chosen_for_long_runs_on_cuda(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert runtime.should_compile("on", cpu, 1) and not runtime.should_compile("off", cuda, 10**9)
    assert runtime.should_compile("auto", cuda, 10**6)
    assert not runtime.should_compile("auto", cuda, 1000) and not runtime.should_compile("auto", cpu, 10**9)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert not runtime.should_compile("auto", cuda, 10**6)
    with pytest.raises(UserError, match="--compile on: needs a C"):
        runtime.should_compile("on", cpu, 1)


@pytest.mark.parametrize(
    "mode",
    [(), ("--embedding_reuse", 3), ("--train", "lora"), ("--train", "encoder", "--grad_checkpointing")],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tiny_weights, config_file, at_iteration, capsys, mode):
    # 9 samples in batches of 2: 5 iterations an epoch in steps of 2, 2 and 1 batches. A state is saved
    # at the test after iteration 6, amid a step; training ends in the 10th.
    config = config_file(percentage=1.5)
    options = (
        "-e", 4, "-b", 2, "--virtual_batch_size", 2, "--prompt", "mixed", "--test_interval", 6,
        "--log_interval", 3, "--lr", 1e-2, *mode,
    )  # fmt: skip
    assert run_tiny(config, tiny_weights, *options) == 0
    whole = checkpoint.load_weights(Path("exp/run/checkpoints/last.pth"))
    whole_curves, output = scalars("exp/run"), capsys.readouterr().out
    shutil.rmtree("exp/run")

    def interrupt(batch, net):
        raise KeyboardInterrupt

    at_iteration(10, interrupt)
    assert run_tiny(config, tiny_weights, *options) == 130
    assert not Path("exp/run/checkpoints/last.pth").exists()
    assert run_tiny(config, tiny_weights, *options, "--resume", "--num_workers", 2) == 0
    resumed_output = capsys.readouterr().out
    assert "resumed     after iteration 6" in resumed_output
    assert output.splitlines()[-4:] == resumed_output.splitlines()[-4:]
    lines = Path("exp/run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 6, 12, 18, 20]
    resumed = checkpoint.load_weights(Path("exp/run/checkpoints/last.pth"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    curves = scalars("exp/run")
    for tag in whole_curves.keys() - NOT_REPEATABLE:
        assert curves[tag] == whole_curves[tag], tag


def test_a_run_without_a_test_set(tiny_weights, config_file, capsys):
    assert run_tiny(config_file(with_test=False), tiny_weights, "-e", 1) == 0
    assert {path.name for path in Path("exp/run/checkpoints").iterdir()} == {"last.pth", "last.json"}
    assert "test/iou" not in scalars("exp/run")
    assert "baseline" not in capsys.readouterr().out


def test_the_baseline_is_measured_at_iteration_0(tiny_weights, config_file):
    assert run_tiny(config_file(), tiny_weights, "-e", 1, "-b", 2) == 0
    measured = dict(scalars("exp/run")["test/iou"])
    experiment = finetune.prepare(tiny_config(config_file(), tiny_weights))
    tests = encode_test_set(
        experiment.test_set, experiment.net, batch_size=2, num_workers=0, stop=runtime.StopRequest()
    )
    ious = [
        compute_stats(logits, test.ground_truth).scores.iou
        for test, logits in evaluate(experiment.net, tests, 1)
    ]
    assert measured[0] == pytest.approx(np.mean(ious), abs=1e-6) and set(measured) == {0, 1, 2, 3}


def test_empty_masks_are_trained_and_tested_on_only_if_the_config_insists(
    tiny_weights, config_file, data, capsys
):
    for path in [*(data / "cables" / "masks").iterdir(), *(data / "test" / "masks").iterdir()]:
        Image.fromarray(np.zeros((48, 64), np.uint8)).save(path)
    config = config_file()
    assert run_tiny(config, tiny_weights, "-e", 1, "--prompt", "mixed") == 2
    error = capsys.readouterr().err
    assert "all 6 masks are empty" in error and "all 3 masks are empty" in error
    document = yaml.safe_load(config.read_text())
    for keys in (*document["dataset"]["train"], document["dataset"]["test"]):
        keys["allow_empty_masks"] = True
    config.write_text(yaml.safe_dump(document))
    assert run_tiny(config, tiny_weights, "-e", 1, "--prompt", "mixed") == 0
    assert all(np.isfinite(value) for _, value in scalars("exp/run")["train/loss"])


# --- bad input: a clear message, exit code 2, nothing written, no traceback ---


def spoil(data, weights, fault):
    """Break one thing; returns what the message must name."""
    cables = data / "cables"
    if fault == "unmatched":
        (cables / "masks" / "0.png").unlink()
        return "0.png: has no mask"
    if fault == "duplicate":
        shutil.copy(cables / "imgs" / "0.png", cables / "imgs" / "0.jpg")
        return "has the same stem"
    if fault == "undecodable":
        (cables / "imgs" / "0.png").write_bytes(b"not an image")
        return "0.png: cannot be decoded"
    if fault == "mismatch":
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(cables / "masks" / "0.png")
        return "its mask is 9 x 9"
    if fault == "not binary":
        noise = np.random.default_rng(0).integers(0, 255, (48, 64)).astype(np.uint8)
        Image.fromarray(noise).save(cables / "masks" / "0.png")
        return "not a binary mask"
    if fault == "no masks folder":
        shutil.rmtree(cables / "masks")
        return "masks: no such folder"
    if fault == "empty folder":
        for path in (cables / "imgs").iterdir():
            path.unlink()
        return "imgs: no .png"
    if fault == "empty backgrounds":
        for path in (data / "backgrounds").iterdir():
            path.unlink()
        return "backgrounds: no .png"
    if fault == "broken test set":
        (data / "test" / "imgs" / "0.png").write_bytes(b"")
        return "0.png: cannot be decoded"
    if fault == "checkpoint of another variant":
        torch.save({"image_encoder.patch_embed.proj.weight": torch.zeros(768, 3, 16, 16)}, weights)
        return "holds weights of vit_b, not of tiny"
    weights.unlink()
    return "checkpoint not found"


@pytest.mark.parametrize(
    "fault",
    ["unmatched", "duplicate", "undecodable", "mismatch", "not binary", "no masks folder", "empty folder",
     "empty backgrounds", "broken test set", "checkpoint of another variant", "no checkpoint"],
)  # fmt: skip
def test_broken_files_end_with_a_message(tiny_weights, config_file, data, capsys, fault):
    expected = spoil(data, tiny_weights, fault)
    assert run_tiny(config_file(), tiny_weights) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith("error: ") and "Traceback" not in error
    assert not Path("exp").exists()


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("dataset: {train: [", "line 1"),
        ("dataset: {train: [{data_dir: nowhere}]}", "dataset.train[0].data_dir: no such folder"),
        ("dataset: {train: [{data_dir: cables, lr: 1}]}", "dataset.train[0].lr: unknown key"),
        (
            "dataset: {train: [{data_dir: cables, bg_paths: [backgrounds], aug_details: []}]}",
            "aug_details lacks crop_foreground",
        ),
    ],
)
def test_bad_configs_end_with_a_message(tiny_weights, data, capsys, document, expected):
    (data / "bad.yaml").write_text(document)
    assert run_tiny(data / "bad.yaml", tiny_weights) == 2
    error = capsys.readouterr().err
    assert expected in error and "bad.yaml" in error
    assert not Path("exp").exists()


def test_a_missing_config_ends_with_a_message(tiny_weights, capsys):
    assert run_tiny("absent.yaml", tiny_weights) == 2
    assert "absent.yaml" in capsys.readouterr().err


def test_a_device_that_is_not_there(tiny_weights, config_file, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_tiny(config_file(), tiny_weights, "--device", "cuda") == 2
    assert "--device cuda" in capsys.readouterr().err and not Path("exp").exists()


def test_a_run_is_never_overwritten(tiny_weights, config_file, capsys):
    kept = Path("exp/run/checkpoints/last.pth")
    kept.parent.mkdir(parents=True)
    kept.write_text("precious")
    assert run_tiny(config_file(), tiny_weights) == 2
    assert "exp/run already holds a run" in capsys.readouterr().err
    assert kept.read_text() == "precious" and list(Path("exp/run").rglob("*.pth")) == [kept]


def test_weights_that_cannot_be_had_end_with_a_message(config_file, capsys, monkeypatch):
    variant = variants.Variant(
        build_tiny, variants.normalize_mean_std, ("none", 0), url="http://127.0.0.1:9/x.pth", sha256="0"
    )
    monkeypatch.setitem(variants.VARIANTS, "tiny", variant)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    assert run_finetune("-c", config_file(), "--model_type", "tiny") == 2
    assert "--checkpoint PATH" in capsys.readouterr().err and not Path("exp").exists()


def test_the_script_itself_ends_without_a_traceback(data):
    (data / "bad.yaml").write_text("dataset: {train: [{data_dir: nowhere}]}")
    command = [sys.executable, str(ROOT / "finetune.py"), "--config", "data/bad.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=data.parent)
    assert result.returncode == 2
    assert result.stderr.startswith("error: data/bad.yaml: 1 error(s)\n  dataset.train[0].data_dir")
    assert "Traceback" not in result.stderr and not (data.parent / "exp").exists()


def test_the_best_weights_are_the_latest_as_long_as_nothing_is_found(config_file, tiny_weights, monkeypatch):
    run_test, ious = finetune.run_test, [0.0, 0.0, 0.0, 0.4, 0.4, 0.0]
    monkeypatch.setattr(
        finetune, "run_test", lambda *args, **flags: run_test(*args, **flags) | {"iou": ious.pop(0)}
    )
    saved = []
    monkeypatch.setattr(
        finetune, "save_checkpoint", lambda run, name: saved.append((name, run.state.iteration))
    )
    assert run_tiny(config_file(), tiny_weights, "-e", 5, "-b", 6, "--test_interval", 1) == 0
    assert [iteration for name, iteration in saved if name == "best.pth"] == [1, 2, 3]
