"""A tiny real SAM and small drawn datasets: every test runs on a CPU without a download."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

# One thread per process, also in NumPy and in the processes that tests start: `make test` runs several
# processes at once, and tiny tensors are slower on many threads.
os.environ["OMP_NUM_THREADS"] = "1"

# The processes that tests start obey signals, also if the tests run under nohup, which ignores SIGHUP.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoint
import finetune
import run_logger
from config import DatasetConfig
from dataset_index import DatasetIndex, index_datasets
from imaging import checking
from imaging.checking import FileInfo
from imaging.pairing import Pair
from sam import variants
from train_config import MODEL_TYPES

MODEL_TYPES.append("tiny")  # `tiny_weights` builds it

# Images for TensorBoard are 64 instead of 1280 pixels wide: PNG files took half the time of a tiny run.
run_logger.sheet = partial(run_logger.sheet, width=64)

TINY_SIZE, TINY_PATCH, TINY_DIM = 64, 8, 32

ALL_GPUS = "all"


def pytest_configure() -> None:
    """Hide GPUs from the tests and the processes that they start: defaults depend on whether there is one.

    The variable VISIBLE_GPUS keeps what was visible for test_cuda.py. Workers of pytest-xdist inherit it.
    """
    os.environ.setdefault("VISIBLE_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", ALL_GPUS))
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # Windows removes a variable that is empty


def show_gpus(patch: pytest.MonkeyPatch) -> None:
    """Let the processes that are started from now on see the GPUs of this machine."""
    patch.setenv("CUDA_VISIBLE_DEVICES", os.environ["VISIBLE_GPUS"])
    if os.environ["VISIBLE_GPUS"] == ALL_GPUS:
        patch.delenv("CUDA_VISIBLE_DEVICES")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch) -> Path:
    """A cache folder of its own for every test, also for the processes that it starts."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def build_tiny() -> Sam:
    """SAM with every kind of its parts (windowed and global attention), 64 px in, 32 px out."""
    embedding = TINY_SIZE // TINY_PATCH
    return Sam(
        ImageEncoderViT(
            img_size=TINY_SIZE,
            patch_size=TINY_PATCH,
            embed_dim=48,
            depth=2,
            num_heads=2,
            out_chans=TINY_DIM,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
        ),
        PromptEncoder(
            embed_dim=TINY_DIM,
            image_embedding_size=(embedding, embedding),
            input_image_size=(TINY_SIZE, TINY_SIZE),
            mask_in_chans=16,
        ),
        MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=TINY_DIM, mlp_dim=64, num_heads=4),
            transformer_dim=TINY_DIM,
            iou_head_depth=3,
            iou_head_hidden_dim=TINY_DIM,
        ),
    ).eval()


@pytest.fixture
def tiny_sam() -> Sam:
    torch.manual_seed(0)
    return build_tiny()


TINY = variants.Variant(
    build_tiny,
    variants.normalize_mean_std,
    ("image_encoder.patch_embed.proj.weight", (48, 3, TINY_PATCH, TINY_PATCH)),
    img_size=TINY_SIZE,
    mask_grid=4 * TINY_SIZE // TINY_PATCH,
)


def write_weights(sam: Sam, folder: Path) -> Path:
    checkpoint.save_weights(sam.state_dict(), folder / "tiny.pth")
    return folder / "tiny.pth"


@pytest.fixture
def tiny_weights(tmp_path, monkeypatch, tiny_sam) -> Path:
    """A checkpoint of the tiny SAM, which `--model_type tiny` then knows how to build."""
    monkeypatch.setitem(variants.VARIANTS, "tiny", TINY)
    return write_weights(tiny_sam, tmp_path)


def randomize_batch_norm(net: torch.nn.Module) -> None:
    """Give every BatchNorm of a TinyViT random parameters and statistics; by default they do nothing."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_(0.5, 0.3)
            module.running_var.uniform_(0.5, 2)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def draw_cable(rng: np.random.Generator, size: tuple[int, int], width: int) -> np.ndarray:
    """A curved line across the image, bool (h, w)."""
    mask = np.zeros(size, np.uint8)
    x = np.linspace(0, size[1], 20)
    y = size[0] * (0.5 + 0.3 * np.sin(x / size[1] * rng.uniform(2, 5) + rng.uniform(0, 6)))
    cv2.polylines(mask, [np.column_stack([x, y]).astype(np.int32)], False, 1, width)
    return mask.astype(bool)


def write_dataset(folder: Path, n: int, size=(48, 64), width=5, seed=0) -> Path:
    """`n` photos of bright cables on dark noise, with their masks."""
    rng = np.random.default_rng(seed)
    for name in ("imgs", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(n):
        mask = draw_cable(rng, size, width)
        image = rng.integers(0, 60, (*size, 3)).astype(np.uint8)
        image[mask] = rng.integers(170, 255, 3)
        Image.fromarray(image).save(folder / "imgs" / f"{number}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{number}.png")
    return folder


def write_backgrounds(folder: Path, n: int = 3, size=(70, 90)) -> Path:
    """`n` dark textured images."""
    rng = np.random.default_rng(9)
    folder.mkdir(parents=True)
    for number in range(n):
        noise = rng.integers(0, 80, (*size, 3)).astype(np.uint8)
        Image.fromarray(cv2.blur(noise, (3, 3))).save(folder / f"bg {number}.jpg")
    return folder


def write_video(path: Path, frames: list[np.ndarray], rate: float = 5) -> None:
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), rate, frames[0].shape[1::-1])
    for frame in frames:
        video.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    video.release()


def write_data(folder: Path) -> Path:
    """`cables/` (6 pairs), `test/` (3 other pairs), and `backgrounds/`."""
    write_dataset(folder / "cables", 6)
    write_dataset(folder / "test", 3, seed=1)
    write_backgrounds(folder / "backgrounds")
    return folder


def write_config(data: Path, with_test: bool = True, **train_keys) -> Path:
    """Write a config beside the data; keyword arguments change keys of its only train dataset."""
    train = {"data_dir": "cables", "bg_paths": ["backgrounds"], "w_aug": True, **train_keys}
    document = {"dataset": {"train": [train]}}
    if with_test:
        document["dataset"]["test"] = {"data_dir": "test"}
    path = data / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data")


@pytest.fixture
def config_file(data):
    """`write_config` beside the data."""
    return partial(write_config, data)


@pytest.fixture
def decoded(monkeypatch) -> list[Pair | Path]:
    """The items that the check of the files decodes, in order."""
    items, decode = [], checking._decode

    def note(item):
        items.append(item)
        return decode(item)

    monkeypatch.setattr(checking, "_decode", note)
    return items


def dataset_index(data, *, backgrounds=True, name="cables", **changes) -> DatasetIndex:
    """Index the folder `name` of `data`; keyword arguments change keys of its config."""
    keys = {
        "data_dir": str(data / name),
        "bg_paths": [str(data / "backgrounds")] if backgrounds else None,
        **changes,
    }
    config = DatasetConfig.model_validate(keys, context={"yaml_dir": data})
    return index_datasets([config])[0]


def run_process(*command, **environment) -> subprocess.CompletedProcess:
    """Run a command to its end, with more variables in its environment."""
    variables = {name: str(value) for name, value in environment.items()}
    return subprocess.run(
        [str(part) for part in command],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,  # a process group of its own
    )


# --- datasets that are only planned with, never read ---


def _index(n: int, percentage: float, backgrounds: tuple, augment: bool) -> DatasetIndex:
    config = DatasetConfig.model_construct(percentage=percentage, bg_paths=backgrounds, w_aug=augment)
    pairs = tuple(Pair(Path(f"{i}"), Path(f"{i}")) for i in range(n))
    return DatasetIndex(config, pairs, (), {pair.image_path: FileInfo((48, 64), "") for pair in pairs})


def constant_index(n: int, percentage: float) -> DatasetIndex:
    """`n` photos that never change."""
    return _index(n, percentage, (), False)


def composite_index(n: int, percentage: float = 1.0) -> DatasetIndex:
    """`n` photos that are composited."""
    return _index(n, percentage, ("b",), True)


# --- runs of finetune.py ---


def run_finetune(*argv) -> int:
    """Run the command line in this process; returns the exit code."""
    try:
        return finetune.main([str(part) for part in argv])
    except SystemExit as stop:  # argparse
        return stop.code


def run_tiny(config, weights, *argv) -> int:
    """The same with the tiny SAM, in float32, to exp/run."""
    return run_finetune(
        "--config", config, "--model_type", "tiny", "--checkpoint", weights, "--exp_name", "run",
        "--device", "cpu", "--amp", "off", "--num_workers", 0, *argv,
    )  # fmt: skip


def tiny_config(config, weights, *argv) -> finetune.TrainConfig:
    """The flags of `run_tiny`."""
    flags = (
        "--config", config, "--model_type", "tiny", "--checkpoint", weights, "--exp_name", "other",
        "--device", "cpu", "--amp", "off", "--num_workers", 0, *argv,
    )  # fmt: skip
    return finetune.parse_args([str(part) for part in flags])


@pytest.fixture
def at_iteration(monkeypatch):
    """`at_iteration(n, act)` calls act(batch, net) when the next run takes its n-th batch.

    The training loop takes every batch from `finetune.training_batches`; this is the one seam for faults.
    """

    def arrange(numbers, act):
        numbers = range(numbers, numbers + 1) if isinstance(numbers, int) else numbers
        training_batches = finetune.training_batches

        def watched(train_set, net, **options):
            monkeypatch.setattr(finetune, "training_batches", training_batches)  # only this run
            for number, batch in enumerate(training_batches(train_set, net, **options), 1):
                if number in numbers:
                    act(batch, net)
                yield batch

        monkeypatch.setattr(finetune, "training_batches", watched)

    return arrange


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves as (iteration, value), by tag."""
    # Two event files of one second are read in the order of a counter as text, 10 before 9: hence sorted.
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: sorted((event.step, event.value) for event in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }


NOT_REPEATABLE = {"train/images_per_s", "train/data_wait"}  # curves that depend on the clock


# --- a run that others, which are interrupted and resumed, must equal ---

# 9 samples in batches of 2: 5 iterations an epoch, in optimizer steps of 2, 2 and 1 batches.
FLAGS = (
    "-e", 4, "-b", 2, "--virtual_batch_size", 2, "--prompt", "mixed", "--test_interval", 6,
    "--log_interval", 3, "--lr", 1e-2,
)  # fmt: skip


@pytest.fixture
def config(config_file) -> Path:
    """A config with 9 samples in an epoch, as `FLAGS` need it."""
    return config_file(percentage=1.5)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of `config` with `FLAGS`, which tests only read."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    weights = write_weights(build_tiny(), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(variants.VARIANTS, "tiny", TINY)
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.chdir(folder)
        config = write_config(write_data(folder / "data"), percentage=1.5)
        assert run_tiny(config, weights, *FLAGS) == 0
    return folder / "exp/run"


def assert_same_results(ours: str | Path, expected: str | Path) -> None:
    """The weights and curves in the folders of two runs are equal, bit for bit."""
    for name in ("best.pth", "last.pth"):
        weights, other = (checkpoint.load_weights(Path(run, "checkpoints", name)) for run in (ours, expected))
        assert weights.keys() == other.keys()
        assert all(torch.equal(weights[key], other[key]) for key in other), name
    curves, other = scalars(ours), scalars(expected)
    assert curves.keys() == other.keys()
    assert all(curves[tag] == other[tag] for tag in other.keys() - NOT_REPEATABLE)
