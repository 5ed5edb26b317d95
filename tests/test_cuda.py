"""CUDA computes what the CPU does. Skipped without an NVIDIA GPU; each test starts processes that see it.

python -m pytest tests/test_cuda.py -n 4
"""

import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    TINY,
    randomize_batch_norm,
    rng,
    run_process,
    run_tiny,
    scalars,
    show_gpus,
)
from PIL import Image
from tiny_run import FORKS

import checkpoint
from imaging.prompts import NO_PROMPT
from inference import LoadedSam, box_prompt, predict_logits
from losses import sum_losses
from sam.encoder import move_to_device, valid_pixels
from sam.point_labels import ABSENT, BOX_CORNER_1, BOX_CORNER_2, FOREGROUND_POINT
from sam.trainable import gradients, load_trained_weights, prepare_training, trained_weights
from sam.variants import VARIANTS

DEVICE = "cuda"
ROOT = Path(__file__).parent.parent
TINY_RUN = ROOT / "tests/tiny_run.py"
# It ends at once without a driver.
SEES_GPU = "import ctypes; ctypes.CDLL('libcuda.so.1'); import torch; print(torch.cuda.is_available())"
SCALE = 1024.0  # of the loss, so that gradients in float16 do not become 0
PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="session")
def missing() -> str:
    """Why PyTorch can use no GPU; empty if it can."""
    with pytest.MonkeyPatch.context() as patch:
        show_gpus(patch)
        done = subprocess.run([sys.executable, "-c", SEES_GPU], capture_output=True, text=True)
    if done.stdout.strip() == "True":
        return ""
    return f"needs an NVIDIA GPU: {(done.stderr.strip() or 'PyTorch finds none').splitlines()[-1]}"


@pytest.fixture(autouse=True)
def on_gpu(missing, tmp_path, monkeypatch):
    if missing:
        pytest.skip(missing)
    show_gpus(monkeypatch)
    monkeypatch.chdir(tmp_path)


# --- Numbers, computed in a new process -----------------------------------------------------------


def in_new_process(function, *args):
    """The result of a function in a new process with this environment; an error has its traceback."""
    with ProcessPoolExecutor(1, FORKS, _prepare_process, (dict(os.environ),)) as pool:
        return pool.submit(function, *args).result()


def _prepare_process(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    VARIANTS["tiny"] = TINY
    torch.set_num_threads(4)


def build(model_type: str, device: str, amp: str, train: str) -> LoadedSam:
    """A model with the same random weights on every device, none of them 0. Nothing is rounded to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    sam = VARIANTS[model_type].build()
    for parameter in sam.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.05)
    randomize_batch_norm(sam)
    sam.train().eval()  # TinyViT's attention copies its biases then
    move_to_device(sam, torch.device(device), PRECISIONS[amp], train=train)
    return LoadedSam(sam, model_type, PRECISIONS[amp], encoder_trains=train == "encoder")


def relative_error(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def errors_of_logits(model_type: str, device: str) -> dict[str, float]:
    """The relative errors of logits on a device, by precision, against float32 on the CPU."""
    images = [rng(i).integers(0, 255, (*size, 3), np.uint8) for i, size in enumerate([(60, 80), (90, 50)])]
    prompts = [NO_PROMPT, [box_prompt(5, 10, 40, 70), *NO_PROMPT]]

    def logits(device: str, amp: str) -> np.ndarray:
        net = build(model_type, device, amp, "decoder")
        assert net.device.type == device
        return np.concatenate([x.ravel() for x in predict_logits(net, images, prompts)])

    expected = logits("cpu", "off")
    return {amp: relative_error(logits(device, amp), expected) for amp in PRECISIONS}


# Autocast to bfloat16 on a CPU, which rounds as CUDA does, has errors of 0.008 to 0.02.
@pytest.mark.parametrize("model_type", ["tiny", "lite_medsam", "lite_medsam_512", "mobile_sam", "vit_b"])
def test_logits_equal_those_of_the_cpu(model_type):
    errors = in_new_process(errors_of_logits, model_type, DEVICE)
    limits = {"off": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
    assert all(errors[amp] < limits[amp] for amp in limits), f"{errors}"


def training_gradients(net: LoadedSam) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of a batch of random images with prompts, and its gradients by name."""
    spec, random = net.spec, torch.Generator().manual_seed(1)
    side, grid = spec.img_size, spec.mask_grid
    images = torch.randint(0, 255, (2, side, side, 3), dtype=torch.uint8, generator=random)
    sizes = torch.tensor([[side, side * 3 // 4], [side // 2, side]])
    points = torch.tensor([[[0.2, 0.3], [0, 0]], [[0.1, 0.1], [0.8, 0.4]]]) * side
    labels = torch.tensor([[FOREGROUND_POINT, ABSENT], [BOX_CORNER_1, BOX_CORNER_2]])
    target = torch.randint(0, 256, (2, 1, grid, grid), dtype=torch.uint8, generator=random)
    logits, iou_pred = net.decode(net.encode(images, sizes), points, labels)
    losses = sum_losses(
        logits,
        iou_pred,
        target.to(net.device),
        valid_pixels(sizes.to(net.device), grid, grid / side),
        alpha=0.7,
        gamma=2.0,
        with_cldice=True,
    )
    total = torch.stack(list(losses.values())).sum()
    (SCALE * total).backward()
    return total.item(), {name: x.cpu().numpy() / SCALE for name, x in gradients(net.sam).items()}


def errors_of_gradients(model_type: str, train: str, device: str) -> dict[str, dict[str, float]]:
    """By precision: the relative errors of the loss, of all gradients together, and of the worst of them."""
    rates = {"lr": 1e-3, "encoder_lr": 1e-3, "layer_decay": 1.0, "lora_rank": 4, "lora_alpha": 8}
    errors, weights = {}, {}
    for place, amp in [("cpu", "off"), *((device, amp) for amp in PRECISIONS)]:
        net = build(model_type, place, amp, train)
        prepare_training(net.sam, train=train, grad_checkpointing=False, **rates)
        if not weights:
            for name, parameter in net.sam.named_parameters():
                if "lora_B" in name:  # they start as 0
                    parameter.data.normal_(0, 0.05)
            weights = trained_weights(net.sam)
            expected_loss, expected = training_gradients(net)
            norm = np.linalg.norm(joined(expected))
            continue
        load_trained_weights(net.sam, weights)
        loss, ours = training_gradients(net)
        assert ours.keys() == expected.keys()
        by_name = {  # a gradient that is 0 but for rounding counts little
            name: float(np.linalg.norm(ours[name] - x) / (np.linalg.norm(x) + 0.01 * norm))
            for name, x in expected.items()
        }
        worst = max(by_name, key=by_name.get)
        total = relative_error(joined(ours), joined(expected))
        errors[amp] = {"loss": abs(loss / expected_loss - 1), "all": total, worst: by_name[worst]}
    return errors


def joined(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([x.ravel() for x in arrays.values()])


MODES = ("decoder", "lora", "encoder")
TRAINED = [(model_type, train) for model_type in ("tiny", "lite_medsam") for train in MODES]


@pytest.mark.parametrize(("model_type", "train"), [*TRAINED, ("vit_b", "decoder")])
def test_gradients_equal_those_of_the_cpu(model_type, train):
    errors = in_new_process(errors_of_gradients, model_type, train, DEVICE)
    assert errors["off"]["loss"] < 1e-4 and errors["off"]["all"] < 1e-3, f"{errors}"
    assert max(errors["off"].values()) < 5e-3, f"{errors}"
    for amp, limit in (("bf16", 0.3), ("fp16", 0.1)):
        assert errors[amp]["loss"] < 0.01 and errors[amp]["all"] < limit, f"{errors}"


# --- Commands ---------------------------------------------------------------------------------


def run_command(*command, code: int = 0, **environment) -> str:
    """Run a command that must end with `code`; returns what it prints."""
    done = run_process(sys.executable, *command, **environment)
    printed = f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == code, f"exit code {done.returncode}\n{printed}"
    return done.stdout


# 9 samples in batches of 2: the last batch of an epoch has one.
FLAGS = ("-b", 2, "-e", 6, "--lr", 1e-2, "--encoder_lr", 1e-3, "--log_interval", 1, "--test_interval", 15)


@pytest.fixture
def composites(config_file) -> Path:
    """A config of composites whose cables keep their places and colors, so that little training is enough."""
    return config_file(percentage=1.5, w_aug=False)


def train_on_gpu(config, weights, *flags, name: str = "gpu", **options) -> Path:
    """Train the tiny SAM; returns the folder of the run."""
    given = ("-c", config, "--model_type", "tiny", "--checkpoint", weights, "-n", name, "--device", DEVICE)
    run_command(TINY_RUN, *given, *FLAGS, *flags, "--num_workers", 1, **options)
    return Path("exp", name)


def losses_of(folder: str | Path) -> np.ndarray:
    return np.array([value for _, value in scalars(folder)["train/loss"]])


def tested(folder: str | Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


TRAININGS = {
    "decoder": ("--train", "decoder", "--prompt", "mixed", "--embedding_reuse", 2, "--virtual_batch_size", 2),
    "lora": ("--train", "lora", "--prompt", "box"),
    "encoder": ("--train", "encoder", "--grad_checkpointing", "--cldice_weight", 0.1),
    "compiled": ("--train", "encoder", "--prompt", "point", "--compile", "on"),
}
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
CASES = [
    *((training, amp) for training in ("decoder", "lora", "encoder") for amp in PRECISIONS),
    *(pytest.param("compiled", amp, marks=needs_compiler) for amp in ("off", "bf16")),
]


@pytest.mark.parametrize(("training", "amp"), CASES)
def test_training_follows_that_of_the_cpu(composites, tiny_weights, training, amp):
    flags = TRAININGS[training]
    ours = train_on_gpu(composites, tiny_weights, *flags, "--amp", amp)
    assert run_tiny(composites, tiny_weights, *FLAGS, *flags, "--compile", "off") == 0
    losses, expected = losses_of(ours), losses_of("exp/run")
    assert len(losses) == len(expected) == 30
    # `--amp off` rounds products to TF32. In float16, the first steps only lower the scale of the gradient.
    n, tolerance = {"off": (10, 0.02), "bf16": (5, 0.03), "fp16": (1, 0.01)}[amp]
    assert losses[:n] == pytest.approx(expected[:n], rel=tolerance)
    assert losses[-10:].mean() < 0.8 * losses[:10].mean(), f"{losses}"
    tests, expected_tests = tested(ours), tested("exp/run")
    assert [test["iteration"] for test in tests] == [0, 15, 30]
    assert tests[0]["iou"] == pytest.approx(expected_tests[0]["iou"], abs=0.02)
    assert all(math.isfinite(test["iou"]) for test in tests)
    best = checkpoint.load_weights(ours / "checkpoints/best.pth")
    assert all(weight.isfinite().all() for weight in best.values())


def test_batch_size_auto_takes_a_whole_step(composites, tiny_weights):
    flags = ("--train", "encoder", "-b", "auto", "--virtual_batch_size", 4)
    folder = train_on_gpu(composites, tiny_weights, *flags)
    settings = yaml.safe_load((folder / "args.yaml").read_text())
    assert (settings["batch_size"], settings["virtual_batch_size"]) == (4, 1)
    assert np.isfinite(losses_of(folder)).all()


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(composites, tiny_weights, amp):
    flags = ("--train", "encoder", "--prompt", "mixed", "--virtual_batch_size", 2, "--amp", amp)
    whole = train_on_gpu(composites, tiny_weights, *flags, name="whole")
    train_on_gpu(composites, tiny_weights, *flags, name="parts", code=143, GROUP_IN=13)
    parts = train_on_gpu(composites, tiny_weights, *flags, "--resume", name="parts")
    initial, expected, ours = (
        checkpoint.load_weights(path)
        for path in (tiny_weights, whole / "checkpoints/last.pth", parts / "checkpoints/last.pth")
    )
    # A bias of all keys changes no attention. Its gradient is rounding alone, which Adam scales up.
    names = [name for name in expected if not name.endswith("k_proj.bias")]
    changes, difference = (
        torch.cat([(expected[name] - other[name]).flatten() for name in names]).norm()
        for other in (initial, ours)
    )
    assert changes > 0 and difference < 0.1 * changes, (difference, changes)
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=0.05)


@pytest.mark.parametrize("tiles", ["off", "40"])
def test_predictions_equal_those_of_the_cpu(composites, data, tiles):
    given = ("-c", composites, "--model_type", "lite_medsam", "-n", "run", "--device", DEVICE)
    run_command(ROOT / "finetune.py", *given, "--train", "encoder", "-b", 2, "-e", 6, "--test_interval", 100)

    def masks(device: str, amp: str) -> np.ndarray:
        flags = ("--device", device, "--amp", amp, "--tiles", tiles, "--output", device + amp)
        paths = ("--checkpoint", "exp/run/checkpoints/last.pth", "--input", data / "test/imgs")
        run_command(ROOT / "predict.py", *paths, *flags)
        files = sorted(Path(device + amp, "masks").glob("*.png"))
        return np.stack([np.asarray(Image.open(path)) > 0 for path in files])

    expected = masks("cpu", "off")
    assert expected.shape == (3, 48, 64) and 0.01 < expected.mean() < 0.5
    different = {amp: float((masks(DEVICE, amp) != expected).mean()) for amp in PRECISIONS}
    assert different["off"] < 0.003 and max(different.values()) < 0.02, f"{different}"


def test_a_benchmark_measures_encoding_and_training(composites):
    flags = ("--config", composites, "--model_type", "lite_medsam", "--device", DEVICE, "--seconds", "0.2")
    table = run_command(ROOT / "tools/bench.py", *flags, "--reuse", 2, "--parts", "encoder", "iteration")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if row[:2] == "| "]
    assert len(rows) == 4, table
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows[1:]), table
