"""What happens before training: the check of the data, the space on the disk, the default test interval."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import run_tiny, tiny_config
from PIL import Image

import checkpoint
import experiment
import finetune
import runtime
from base.errors import UserError
from config import Config, load_config
from embeddings import pool_spec
from imaging import checking


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_second_start_decodes_no_file(config_file, decoded):
    config = load_config(config_file())
    first = experiment.find_data(config, 10**6)
    assert len(decoded) == 12  # 6 pairs, 3 backgrounds, 3 test pairs
    decoded.clear()
    assert experiment.find_data(config, 10**6) == first
    assert decoded == []


def test_a_test_photo_among_the_backgrounds_is_named(config_file, data):
    tested, background = data / "test/imgs/1.png", data / "backgrounds/bg 3.png"
    Image.open(tested).save(background, compress_level=1)  # other bytes, the same pixels
    with pytest.warns(UserWarning, match="does not measure generalization") as warned:
        experiment.find_data(load_config(config_file()), 10**6)
    leak = f"{tested} = background {background}, so training takes its cables for background"
    assert str(warned[0].message).split("\n  ")[1:] == [leak]


def test_photos_of_cables_among_the_backgrounds_are_named(config_file, data):
    for name, mask in (("1", None), ("2", Image.new("L", (64, 48)))):
        photo, background = data / f"cables/imgs/{name}.png", data / f"backgrounds/bg {name}.png"
        Image.open(photo).save(background, compress_level=1)  # other bytes, the same pixels
        if mask:  # a photo without a cable may be a background
            mask.save(data / f"cables/masks/{name}.png")
    with pytest.warns(UserWarning, match="takes these cables for background") as warned:
        experiment.find_data(load_config(config_file()), 10**6)
    listed = f"{data / 'backgrounds/bg 1.png'} = {data / 'cables/imgs/1.png'}"
    assert str(warned[0].message).split("\n  ")[1:] == [listed]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_check_ends_it_with_a_line(
    config_file, tiny_weights, decoded, monkeypatch, capsys, number
):
    handler, decode = signal.getsignal(number), checking._decode

    def signal_at_the_first(item):
        infos = decode(item)
        if len(decoded) == 1:
            os.kill(os.getpid(), number)
        time.sleep(0.1)
        return infos

    monkeypatch.setattr(checking, "PIXELS_AT_ONCE", 1)  # one item after the other
    monkeypatch.setattr(checking, "_decode", signal_at_the_first)
    assert run_tiny(config_file(), tiny_weights) == 128 + number
    assert capsys.readouterr().err == f"{signal.Signals(number).name}: nothing was trained\n"
    assert len(decoded) <= 2 and not Path("exp").exists()
    assert signal.getsignal(number) is handler


def check_together(rank: int, folder: Path, config: Config, results: "multiprocessing.SimpleQueue") -> None:
    """Check the data twice, the second time with a damaged file, in a group that waits for 2 s only."""
    index_datasets = experiment.index_datasets

    def index_slowly(*args, **options):
        results.put((rank, "checks"))
        time.sleep(2.5)
        return index_datasets(*args, **options)

    os.environ["RANK"] = str(rank)
    experiment.index_datasets = index_slowly
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))
    train, test = experiment.find_data(config, 10**6)
    results.put((rank, f"has {len(train[0].infos)} + {len(test.infos)} files"))
    dist.barrier()
    if rank == 0:
        (config.dataset.test.data_dir / "imgs/1.png").write_bytes(b"")
    try:
        experiment.find_data(config, 10**6)
    except UserError as error:
        results.put((rank, str(error)))


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_one_process_checks_and_all_have_the_result(config_file, data, tmp_path):
    context = multiprocessing.get_context("fork")
    results, config = context.SimpleQueue(), load_config(config_file())
    processes = [
        context.Process(target=check_together, args=(rank, tmp_path, config, results)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    said = [results.get() for _ in range(6)]
    assert results.empty()
    assert said.count((0, "checks")) == 2  # and process 1 never does
    assert {(0, "has 15 + 6 files"), (1, "has 15 + 6 files")} < set(said)
    faults = [text for _, text in said if "problem" in text]
    assert faults[0] == faults[1]
    assert faults[0].startswith(f"1 problem(s) in the data:\n  {data / 'test/imgs/1.png'}: cannot be decoded")


def test_a_run_has_about_eight_tests_by_default_and_keeps_their_interval(
    tiny_weights, config_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = config_file(percentage=1.5)  # 9 samples in batches of 2: 5 iterations an epoch
    assert run_tiny(config, tiny_weights, "-e", 4, "-b", 2) == 0
    lines = [json.loads(line) for line in Path("exp/run/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 3, 6, 9, 12, 15, 18, 20]
    assert yaml.safe_load(Path("exp/run/args.yaml").read_text())["test_interval"] == 3
    for flags, expected in (((), 3), (("--test_interval", 7), 7)):
        resumed = tiny_config(config, tiny_weights, "-n", "run", "--resume", "-e", 8, "-b", 2, *flags)
        assert experiment.prepare(resumed).config.test_interval == expected


def test_a_full_disk_refuses_reuse_before_anything_is_written(tiny_weights, config_file, monkeypatch, capsys):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    assert run_tiny(config_file(), tiny_weights, "--embedding_reuse", 2) == 2
    assert "error: --embedding_reuse 2: 0 MiB of embeddings and " in capsys.readouterr().err
    assert not Path("exp").exists()
    photos = config_file(bg_paths=None, w_aug=False)
    with pytest.warns(UserWarning, match="photos are encoded again in every epoch"):
        assert run_tiny(photos, tiny_weights, "-e", 2) == 0


def test_the_check_of_disk_space_counts_the_pool_of_a_machine_once(tiny_weights, config_file, monkeypatch):
    needed = []
    monkeypatch.setattr(experiment, "require_free_space", lambda folder, size, purpose: needed.append(size))
    for processes in (1, 3):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        experiment.prepare(tiny_config(config_file(), tiny_weights, "--embedding_reuse", 2))
    assert needed[1] == needed[0] > 0


@pytest.mark.parametrize("options", [(), ("--keep_last", 2)])
def test_the_check_of_disk_space_counts_all_that_the_run_writes(
    tiny_weights, config_file, monkeypatch, options
):
    needed = []
    monkeypatch.setattr(experiment, "require_free_space", lambda folder, size, purpose: needed.append(size))
    photos = config_file(bg_paths=None, w_aug=False)
    options = ("-e", 6, "--save_interval", 1, "--virtual_batch_size", 4, *options)
    assert run_tiny(photos, tiny_weights, *options) == 0
    config = tiny_config(photos, tiny_weights, *options, "--exp_name", "run")
    net, _ = experiment.build_net(config, tiny_weights, torch.device("cpu"))
    written = sum(path.stat().st_size for path in Path("exp/run").rglob("*.pth"))
    pool = pool_spec(6, net).size
    assert written < needed[0] - pool - experiment.LOGS < 2 * written
    still_needed = experiment.size_of_saves(config, net, 6)  # if the run is resumed
    assert still_needed < needed[0] - pool - 0.9 * written


@pytest.mark.parametrize("train", ["encoder", "lora"])
def test_the_size_of_saves_counts_an_encoder_that_trains(tiny_weights, config_file, train):
    options = ("-e", 1, "--train", train)
    config = tiny_config(config_file(), tiny_weights, *options)
    net, _ = experiment.build_net(config, tiny_weights, torch.device("cpu"))
    at_start = experiment.size_of_saves(config, net, 1) - experiment.LOGS
    finetune.prepare_optimizer(net.sam, config)
    in_training = experiment.size_of_saves(config, net, 1) - experiment.LOGS
    assert run_tiny(config_file(), tiny_weights, *options) == 0
    sizes = [path.stat().st_size for path in Path("exp/run").rglob("*.pth")]
    assert sum(sizes) + max(sizes) < in_training <= at_start  # the largest one exists twice for a moment


def test_photos_are_encoded_again_where_checkpoints_leave_no_space_to_keep_them(
    tiny_weights, config_file, monkeypatch
):
    photos = config_file(bg_paths=None, w_aug=False)
    config = tiny_config(photos, tiny_weights, "-e", 20, "--save_interval", 1)
    net, _ = experiment.build_net(config, tiny_weights, torch.device("cpu"))
    usage = shutil.disk_usage(".")
    needed = pool_spec(6, net).size + experiment.size_of_saves(config, net, 20)
    for lacking, n_slots in ((0, 6), (1, 0)):
        free = needed - lacking
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: usage._replace(free=free))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert experiment.prepare(config).train_set.n_cache_slots == n_slots
        assert len(warned) == lacking


def test_the_length_of_a_run_of_minutes_does_not_come_from_the_number_of_epochs(
    tiny_weights, config_file, monkeypatch
):
    needed, images = [], []
    monkeypatch.setattr(experiment, "require_free_space", lambda folder, size, purpose: needed.append(size))
    monkeypatch.setattr(runtime, "should_compile", lambda choice, device, count: images.append(count))
    photos = config_file(bg_paths=None, w_aug=False)
    for flags in (["-e", 1, "-s", 1], ["-e", 500, "-s", 1], ["--keep_last", 2, "-s", 1]):
        experiment.prepare(tiny_config(photos, tiny_weights, "--minutes", 2, *flags))
    weights = 4 * sum(weight.numel() for weight in checkpoint.load_weights(tiny_weights).values())
    assert needed[0] == needed[1] == needed[2] > 2 * weights  # no checkpoint of an epoch, photos are kept
    assert images == [2 * 60 * experiment.IMAGES_PER_SECOND] * 3


def test_a_run_of_minutes_warns_once_its_epochs_are_too_many_for_the_disk(
    tiny_weights, config_file, monkeypatch
):
    flags = ("-b", 2, "--minutes", 5, "--save_interval", 1)
    config = tiny_config(config_file(), tiny_weights, *flags)
    net, _ = experiment.build_net(config, tiny_weights, torch.device("cpu"))
    free = experiment.size_of_saves(config, net, experiment.UNMEASURED_EPOCHS)  # enough without epochs
    usage = shutil.disk_usage(".")._replace(free=free)
    monkeypatch.setattr(finetune.Budget, "epochs", lambda budget, done, iteration, *_: 4 * (iteration == 2))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert run_tiny(config_file(), tiny_weights, *flags) == 0
        assert not warned
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        assert run_tiny(config_file(), tiny_weights, *flags, "-n", "full") == 0
    (text,) = [str(warning.message) for warning in warned]
    assert text.startswith("4 epochs write up to 1") and "to exp/full, but its disk has 10" in text
    assert "--keep_last or --save_interval" in text


def test_photos_are_encoded_again_if_the_disk_fills_up_after_the_check(
    tiny_weights, config_file, monkeypatch
):
    photos = config_file(bg_paths=None, w_aug=False)
    assert run_tiny(photos, tiny_weights, "-e", 3) == 0
    expected = checkpoint.load_weights(Path("exp/run/checkpoints/last.pth"))

    def fail(descriptor, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.warns(UserWarning, match="cannot reserve .* photos are encoded again in every epoch"):
        assert run_tiny(photos, tiny_weights, "-e", 3, "-n", "again") == 0
    weights = checkpoint.load_weights(Path("exp/again/checkpoints/last.pth"))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert run_tiny(config_file(), tiny_weights, "--embedding_reuse", 2, "-n", "reuse") == 1


@pytest.mark.parametrize(
    ("local_rank", "expected"), [("0", ["download", "wait"]), ("1", ["wait", "download"])]
)
def test_the_first_process_of_a_machine_downloads_the_weights(
    config_file, tmp_path, monkeypatch, local_rank, expected
):
    calls = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(experiment, "pretrained_path", lambda model_type: calls.append("download"))
    monkeypatch.setattr(runtime, "barrier", lambda: calls.append("wait"))
    experiment.find_weights(replace(tiny_config(config_file(), tmp_path / "none.pth"), checkpoint=None))
    assert calls == expected
