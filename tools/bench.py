"""Measure the speed and memory of training on this machine, beside a naive baseline loop.

    python tools/bench.py --model_type lite_medsam

The baseline loop uses float32, the modules of SAM as they are, one decoder call per image and `.item()` in
every step, and caches nothing. Weights are random. Every number comes from a separate process. "Iteration" is
the whole training: the baseline loop of this file, and the real finetune.py.
"""

import argparse
import contextlib
import copy
import importlib.util
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from segment_anything.modeling import Sam
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint
import runtime
from base.errors import UserError
from config import load_config
from dataset import TrainSample, TrainSet
from dataset_index import index_datasets
from imaging.geometry import InputSpec
from losses import dice_loss, focal_loss, iou_mse
from sam import decoder, trainable, variants
from sam import encoder as sam_encoder
from train_state import build_optimizer

PARTS = ("encoder", "step", "loader", "iteration")
PEER_MODELS = ("vit_b", "vit_l", "vit_h")  # model types that micro-sam trains too
ENDLESS = 10**9  # epochs of a measurement, which ends by time
CACHE_BYTES = 1 << 31


@dataclass(frozen=True)
class Settings:
    """The flags of the command line."""

    config: Path
    model_type: str
    train: str
    grad_checkpointing: bool
    batch_size: int
    device: str
    amp: str
    compile: str
    num_workers: int
    reuse: int
    parts: list[str]
    without_baseline: bool
    seconds: float
    peer: str | None = None


@dataclass(frozen=True)
class Measurement:
    """Speed (images or other units per second), peak memory in GB, and share of time waiting for data.

    fault: why nothing was measured, or "".
    """

    rate: float = math.nan
    memory_gb: float = math.nan
    data_wait: float = math.nan
    fault: str = ""


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(
        description="Measure speed and memory of training, beside a naive baseline loop.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--config", type=Path, default=ROOT / "configs/demo.yaml", help="YAML file of the data to load")
    add("--model_type", choices=list(variants.VARIANTS), default="vit_b", help="SAM variant")
    add("--train", choices=["decoder", "lora", "encoder"], default="decoder", help="what trains")
    add("--grad_checkpointing", action="store_true", help="as in finetune.py; not in the baseline loop")
    add("--batch_size", type=int, default=4, help="samples per iteration")
    add("--device", choices=["cuda", "cpu"], default=device, help="where to compute")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="precision of this tool")
    add("--compile", choices=["on", "off"], default="off", help="compile in the iterations of this tool")
    add("--num_workers", type=int, default=1, help="data workers of whole iterations")
    add("--reuse", type=int, default=4, help="--embedding_reuse of the last row")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    add("--without_baseline", action="store_true", help="do not run the baseline loop")
    add("--seconds", type=float, default=20, help="approximate duration of each measurement")
    add(
        "--peer", choices=["micro_sam"], help="also run the training loop of this package, if it is installed"
    )
    args = parser.parse_args(argv)
    if args.peer and not importlib.util.find_spec(args.peer):
        parser.error(
            f"argument --peer: {args.peer} is not installed; install it with pip install {args.peer}"
        )
    if args.peer and (args.model_type not in PEER_MODELS or args.train == "lora"):
        parser.error(
            f"argument --peer: runs for --model_type {', '.join(PEER_MODELS)} with --train decoder or encoder"
        )
    args.config = args.config.resolve()
    if not args.config.is_file():
        parser.error(f"argument --config: there is no file {args.config}")
    return Settings(**vars(args))


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns 0; 1 if a row has no speed of this tool; 2 for an error that the user can correct. If the memory
    is too small for a row, the row says so, and the other rows are measured.
    """
    runtime.init()
    settings = parse_args(argv)
    rates: list[float] = []  # of this tool
    try:
        load_config(settings.config)
        if settings.peer:
            in_new_process(require_micro_sam)
        print_head(settings)
        if "encoder" in settings.parts:
            rates += [compare("encoder", settings, measure_encoder)]
        if "step" in settings.parts:
            rates += [compare(f"{settings.train} step", settings, measure_step)]
        if "loader" in settings.parts:
            rates += [compare("loader, one core", settings, measure_loader)]
        if "iteration" in settings.parts:
            rates += compare_iterations(settings)
        if "encoder" in settings.parts and not math.isnan(rates[0]):
            print_efficiency(rates[0], settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(any(map(math.isnan, rates)))


def compare(name: str, settings: Settings, measure: Callable[[Settings, bool], Measurement]) -> float:
    """Measure with and without the baseline, and print a row of the table; returns our images/s or NaN."""
    baseline = measure_baseline(measure, settings)
    ours = attempt(measure, settings, False)
    print_row(name, baseline, ours)
    return ours.rate


def compare_iterations(settings: Settings) -> list[float]:
    """Print a row for whole iterations without reuse, and one with reuse if the encoder is frozen.

    With --peer, a row more has that package in place of the baseline loop, and this tool without reuse.

    Returns our images/s of each row, or NaN.
    """
    rates = []
    baseline = measure_baseline(measure_iteration, settings)
    for reuse in (1, settings.reuse) if settings.train == "decoder" else (1,):
        ours = attempt(measure_command, settings, reuse)
        print_row(f"iteration, reuse {reuse}, data wait {ours.data_wait:.0%}", baseline, ours)
        if settings.peer and reuse == 1:
            peer = attempt(measure_micro_sam, settings)
            print_row("iteration, micro-sam in place of the baseline loop", peer, ours)
        rates.append(ours.rate)
    return rates


def measure_baseline(measure: Callable[[Settings, bool], Measurement], settings: Settings) -> Measurement:
    """Measure the baseline, or return NaN with --without_baseline."""
    return Measurement() if settings.without_baseline else attempt(measure, settings, True)


def print_head(settings: Settings) -> None:
    print(
        f"{settings.model_type}, {settings.train}, batch size {settings.batch_size}, "
        f"{settings.device}, {os.cpu_count()} cores\n"
    )
    print("| | baseline loop, images/s | this tool, images/s | ratio | baseline loop, GB | this tool, GB |")
    print("|---|---|---|---|---|---|", flush=True)


def print_row(name: str, baseline: Measurement, ours: Measurement) -> None:
    rates = [measured.fault or f"{measured.rate:.2f}" for measured in (baseline, ours)]
    speeds = f"{rates[0]} | {rates[1]} | {ours.rate / baseline.rate:.1f}"
    print(f"| {name} | {speeds} | {baseline.memory_gb:.1f} | {ours.memory_gb:.1f} |", flush=True)


def print_efficiency(encoder_rate: float, settings: Settings) -> None:
    """Print how much of the machine's arithmetic speed the encoder reaches."""
    gflop = encoder_flops(settings.model_type) / 1e9
    reached, peak = gflop * encoder_rate, in_new_process(measure_matrix_product, settings).rate
    print(
        f"\nencoder: {gflop:.0f} GFLOP per image, {reached:.0f} GFLOP/s; "
        f"a large matrix product: {peak:.0f} GFLOP/s ({reached / peak:.0%})"
    )


# --- Measuring --------------------------------------------------------------------------------


class EndedEarly(UserError):
    """finetune.py failed, possibly out of memory."""


def attempt(measure: Callable[..., Measurement], *args: object) -> Measurement:
    """As `in_new_process`, but out of memory and a failure of finetune.py are a `fault`, and are printed."""
    message: str | None
    try:
        return in_new_process(measure, *args)
    except EndedEarly as error:
        fault, message = "failed", str(error)
    except BrokenProcessPool:
        fault, message = "killed", "the process was killed, possibly out of memory"
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        fault, message = "out of memory", runtime.user_message(error, "a smaller --batch_size needs less")
        if message is None:
            raise
    print(f"error: {message}", file=sys.stderr)
    return Measurement(fault=fault)


Result = TypeVar("Result")


def in_new_process(measure: Callable[..., Result], *args: object) -> Result:
    """Return `measure(*args)`, computed in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


def time_calls(call: Callable[[], object], amount: float, device: str, seconds: float) -> Measurement:
    """Call repeatedly for about `seconds`, after warm-up calls. One call counts as `amount`."""
    min_calls = 2 if seconds else 1
    for _ in range(min_calls):
        call()
    synchronize(device)
    start, calls = time.perf_counter(), 0
    while calls < min_calls or time.perf_counter() - start < seconds:
        call()
        calls += 1
    synchronize(device)
    elapsed = time.perf_counter() - start
    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else peak_memory_gb()
    return Measurement(amount * calls / elapsed, memory)


def synchronize(device: str) -> None:
    """Wait for the kernels of a CUDA device."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory_gb(*, of_children: bool = False) -> float:
    """Peak resident memory of this process or of its largest child, in GB; NaN on Windows."""
    try:
        import resource
    except ImportError:
        return math.nan
    usage = resource.getrusage(resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF)
    return usage.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


# --- Encoder and decoder ----------------------------------------------------------------------


def build(settings: Settings, baseline: bool) -> tuple[Sam, torch.dtype | None, torch.optim.Optimizer]:
    """Return a SAM with random weights on the device, its compute dtype, and an optimizer of what trains."""
    device = torch.device(settings.device)
    sam = variants.VARIANTS[settings.model_type].build().to(device).eval().requires_grad_(False)
    amp = None if baseline else runtime.amp_dtype(settings.amp, device)
    if not baseline:
        runtime.init()
        runtime.allow_tf32(amp, device)
        sam_encoder.move_to_device(sam, device, amp, train=settings.train)
    groups = trainable.prepare_training(
        sam,
        train=settings.train,
        lr=1e-4,
        encoder_lr=1e-4,
        layer_decay=0.9,
        lora_rank=8,
        lora_alpha=16,
        grad_checkpointing=settings.grad_checkpointing and not baseline,
    )
    if baseline:
        return sam, amp, torch.optim.AdamW([dict(group) for group in groups])
    return sam, amp, build_optimizer(groups, weight_decay=0.01, device=device)


def random_images(sam: Sam, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return images uint8 (B, S, S, 3) and their sizes (B, 2), without padding."""
    n, side = settings.batch_size, sam.image_encoder.img_size
    images = torch.randint(0, 255, (n, side, side, 3), dtype=torch.uint8, device=settings.device)
    return images, torch.tensor([[side, side]] * n, device=settings.device)


@torch.no_grad()
def measure_encoder(settings: Settings, baseline: bool) -> Measurement:
    sam, amp, _ = build(settings, baseline)
    return time_calls(
        lambda: encode(sam, amp, *random_images(sam, settings), settings, baseline),
        settings.batch_size,
        settings.device,
        settings.seconds,
    )


def encode(
    sam: Sam, amp: torch.dtype | None, images: Tensor, sizes: Tensor, settings: Settings, baseline: bool
) -> Tensor:
    """Return embeddings (B, 256, e, e)."""
    if baseline:
        return sam.image_encoder(sam_encoder.preprocess(images, sizes, settings.model_type).contiguous())
    with runtime.autocast(torch.device(settings.device), amp if settings.train == "encoder" else None):
        return sam_encoder.encode(sam, images, sizes, settings.model_type)


def measure_step(settings: Settings, baseline: bool) -> Measurement:
    """Measure optimizer steps: from embeddings if the encoder is frozen, otherwise from images."""
    sam, amp, optimizer = build(settings, baseline)
    n, (images, sizes) = settings.batch_size, random_images(sam, settings)
    side = sam.prompt_encoder.image_embedding_size[0]
    kept = torch.randn(n, 256, side, side, device=settings.device, dtype=amp)
    target = torch.rand(n, 1, 4 * side, 4 * side, device=settings.device)
    points = torch.zeros(n, 0, 2, device=settings.device)
    labels = torch.zeros(n, 0, device=settings.device, dtype=torch.long)

    def run_step() -> None:
        embeddings = kept
        if settings.train != "decoder":
            embeddings = encode(sam, amp, images, sizes, settings, baseline)
        if baseline:
            baseline_step(sam, optimizer, embeddings, target, sizes)
            return
        with runtime.autocast(torch.device(settings.device), amp):
            logits, iou_pred = decoder.decode(sam, embeddings, points, labels)
        train_step(sam, optimizer, logits.float(), iou_pred, target, sizes)

    return time_calls(run_step, n, settings.device, settings.seconds)


def baseline_step(
    sam: Sam, optimizer: torch.optim.Optimizer, embeddings: Tensor, target: Tensor, sizes: Tensor
) -> float:
    """Decode image by image with the modules of SAM, and make an optimizer step; returns the loss."""
    outputs = []
    for embedding in embeddings:
        sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
        position = sam.prompt_encoder.get_dense_pe()
        outputs.append(sam.mask_decoder(embedding[None], position, sparse, dense, multimask_output=False))
    logits, iou_pred = map(torch.cat, zip(*outputs, strict=True))
    return train_step(sam, optimizer, logits, iou_pred, target, sizes).item()


def train_step(
    sam: Sam,
    optimizer: torch.optim.Optimizer,
    logits: Tensor,
    iou_pred: Tensor,
    target: Tensor,
    sizes: Tensor,
) -> Tensor:
    """Compute the loss and make an optimizer step; returns the loss."""
    valid = sam_encoder.valid_pixels(sizes, logits.shape[-1], logits.shape[-1] / sam.image_encoder.img_size)
    focal = focal_loss(logits, target, valid, alpha=0.7, gamma=2.0)
    loss = (20 * focal + dice_loss(logits, target, valid) + iou_mse(iou_pred, logits, target, valid)).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def encoder_flops(model_type: str) -> float:
    """Return the floating point operations of the official encoder for one image."""
    encoder = variants.VARIANTS[model_type].build().eval().image_encoder
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(encoder).to("meta")(torch.empty(1, 3, *[encoder.img_size] * 2, device="meta"))
    return counter.get_total_flops()


def measure_matrix_product(settings: Settings) -> Measurement:
    """Measure the GFLOP/s of one large matrix product in the compute dtype."""
    dtype = runtime.amp_dtype(settings.amp, torch.device(settings.device)) or torch.float32
    side = 8192 if settings.device == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=settings.device).to(dtype)
    return time_calls(lambda: a @ b, 2 * side**3 / 1e9, settings.device, settings.seconds)


# --- Data and whole iterations ----------------------------------------------------------------


def make_train_set(settings: Settings, cache_bytes: int = 0, mask_grid: int | None = None) -> TrainSet:
    variant = variants.VARIANTS[settings.model_type]
    spec = InputSpec(variant.img_size, mask_grid or variant.mask_grid)
    datasets = index_datasets(list(load_config(settings.config).dataset.train))
    return TrainSet(datasets, spec=spec, prompt="none", seed=0, cache_bytes=cache_bytes)


def measure_loader(settings: Settings, baseline: bool) -> Measurement:
    """Measure how many samples one core makes per second; the baseline decodes every file again."""
    if not baseline:
        runtime.init()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    train_set = make_train_set(settings, cache_bytes=0 if baseline else CACHE_BYTES)
    for key in train_set.epoch(0):  # fills the cache, as the first epoch of a run does
        train_set[key]
    keys = (key for epoch in range(1, ENDLESS) for key in train_set.epoch(epoch))
    return time_calls(lambda: train_set[next(keys)], 1, "cpu", settings.seconds)


def measure_iteration(settings: Settings, baseline: bool) -> Measurement:
    """Measure the baseline loop: load, encode and decode a batch, and make an optimizer step."""
    assert baseline  # `measure_command` measures this tool
    sam, _, optimizer = build(settings, baseline)
    train_set = make_train_set(settings)
    batches = (
        keys
        for epoch in range(ENDLESS)
        for keys in train_set.epoch_batches(epoch, batch_size=settings.batch_size)
    )
    data = iter(DataLoader(train_set, batch_sampler=batches, num_workers=settings.num_workers))

    def run_iteration() -> None:
        batch = {name: tensor.to(settings.device) for name, tensor in next(data).items()}
        with torch.set_grad_enabled(settings.train != "decoder"):
            embeddings = encode(sam, None, batch["image"], batch["size"], settings, baseline)
        baseline_step(sam, optimizer, embeddings, batch["target"] / 255, batch["size"])

    return time_calls(run_iteration, settings.batch_size, settings.device, settings.seconds)


class TimedLoader(DataLoader[Any]):
    """A data loader whose epoch ends after some seconds. The first batch warms up and is not timed.

    shuffle: micro-sam asks for it.
    elapsed, batches: the duration of the timed batches, and their number.
    """

    shuffle = False
    elapsed = math.nan
    batches = 0

    def __init__(self, *args: Any, device: str, seconds: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._device, self._seconds = device, seconds

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start = time.perf_counter()
        for number, batch in enumerate(super().__iter__()):
            if number == 1:
                synchronize(self._device)
                start = time.perf_counter()
            self.elapsed, self.batches = time.perf_counter() - start, max(0, number - 1)
            if number > 1 and self.elapsed >= self._seconds:
                return
            yield batch


def require_micro_sam() -> None:
    """Raise UserError if micro-sam cannot be imported."""
    try:
        import micro_sam.training  # type: ignore[import-not-found]  # not a requirement  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"argument --peer: micro_sam is installed but cannot be imported: {error}. "
            "pip install micro_sam also installs the packages that it needs"
        ) from None


def measure_micro_sam(settings: Settings) -> Measurement:
    """Measure the training loop of micro-sam, with its defaults, on the composites of this tool.

    An iteration of micro-sam decodes each image with eight prompts, one after the other. The class of all
    cables is its only object. Source: Archit et al., Segment Anything for Microscopy, Nature Methods 2025.
    """
    from micro_sam.training import train_sam

    variant = variants.VARIANTS[settings.model_type]
    train_set = make_train_set(settings, mask_grid=variant.img_size)
    batches = [
        keys
        for epoch in range(1000)
        for keys in train_set.epoch_batches(epoch, batch_size=settings.batch_size)
    ]
    options: dict[str, Any] = {
        "collate_fn": micro_sam_batch,
        "device": settings.device,
        "num_workers": settings.num_workers,
    }
    train_loader = TimedLoader(train_set, batch_sampler=batches, seconds=settings.seconds, **options)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        checkpoint.save_weights(variant.build().state_dict(), Path(folder) / "weights.pth")
        train_sam(
            "peer",
            settings.model_type,
            train_loader,
            TimedLoader(train_set, batch_sampler=batches[:1], seconds=0, **options),
            n_epochs=1,
            checkpoint_path=f"{folder}/weights.pth",
            with_segmentation_decoder=False,
            freeze=["image_encoder", "prompt_encoder"] if settings.train == "decoder" else None,
            device=settings.device,
            save_root=folder,
            verify_n_labels_in_loader=None,
        )
    memory = torch.cuda.max_memory_allocated() / 1e9 if settings.device == "cuda" else peak_memory_gb()
    return Measurement(settings.batch_size * train_loader.batches / train_loader.elapsed, memory)


def micro_sam_batch(samples: list[TrainSample]) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) float in 0..255, and labels (B, 1, S, S) in which 1 is cable."""
    batch = default_collate(samples)
    return batch["image"].permute(0, 3, 1, 2).float(), (batch["target"] > 127).long()


def measure_command(settings: Settings, reuse: int) -> Measurement:
    """Measure finetune.py itself, from its TensorBoard curves.

    The first epoch is left out, because it cannot reuse anything. Raises EndedEarly if the command fails.
    """
    iterations_per_epoch = -(-make_train_set(settings).epoch_length // settings.batch_size)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "errors").open("w+") as errors:
        weights = variants.VARIANTS[settings.model_type].build().state_dict()
        checkpoint.save_weights(weights, Path(folder) / "weights.pth")
        process = subprocess.Popen(
            finetune_command(settings, reuse, iterations_per_epoch),
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            curves = wait_for_curves(process, Path(folder), settings.seconds, min_epochs=reuse + 1)
        finally:
            process.kill()
            process.wait()
    epochs = curves.Scalars("train/images_per_s")[1:]
    used = len(epochs) // reuse * reuse  # over these epochs, every sample is encoded equally often
    memory = peak_memory_gb(of_children=True)
    if settings.device == "cuda":
        memory = curves.Scalars("train/gpu_memory_gb")[-1].value
    return Measurement(
        rate=float(1 / np.mean([1 / event.value for event in epochs[-used:]])),
        memory_gb=memory,
        data_wait=float(np.mean([e.value for e in curves.Scalars("train/data_wait")[1:][-used:]])),
    )


def finetune_command(settings: Settings, reuse: int, iterations_per_epoch: int) -> list[str]:
    """Return a finetune.py command that never ends, never tests, and logs once per epoch."""
    names = ("config", "model_type", "batch_size", "device", "amp", "compile", "num_workers", "train")
    flags: dict[str, Any] = {name: getattr(settings, name) for name in names}
    flags |= {"checkpoint": "weights.pth", "exp_name": "bench", "embedding_reuse": reuse}
    never = 10**9
    flags |= {"log_interval": iterations_per_epoch, "epoch_num": 10**6}
    flags |= {"test_interval": never, "save_interval": never}
    command = [sys.executable, str(ROOT / "finetune.py")]
    command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    return command + ["--grad_checkpointing"] * settings.grad_checkpointing


def wait_for_curves(
    process: subprocess.Popen[bytes], folder: Path, seconds: float, *, min_epochs: int
) -> EventAccumulator:
    """Wait until the curves, without the first epoch, cover enough epochs and seconds.

    Raises EndedEarly with the end of the file `errors` if the process ends before.
    """
    curves = EventAccumulator(f"{folder}/exp/bench")
    epochs: list[ScalarEvent] = []
    while len(epochs) < min_epochs or epochs[-1].wall_time - epochs[0].wall_time < seconds:
        time.sleep(1)
        if process.poll() is not None:
            raise EndedEarly(f"finetune.py ended early:\n{(folder / 'errors').read_text()[-2000:]}")
        if Path(curves.path).exists() and "train/data_wait" in curves.Reload().Tags()["scalars"]:
            epochs = curves.Scalars("train/images_per_s")[1:]
    return curves


if __name__ == "__main__":
    sys.exit(main())
