"""How fast training runs here, against a plain loop around the official modules.

    python tools/bench.py --model_type lite_medsam

The plain loop is what one writes first: float32, SAM's modules as they are, one decoder call a picture,
`.item()` at every step, nothing cached. Weights are random. Every number comes from a fresh process;
"iteration" is all of training: plain from this file, ours by the real command.
"""

import argparse
import copy
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from segment_anything.modeling import Sam
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint
import runtime
from config import load_config
from dataset import TrainSet, index_datasets
from imaging.geometry import InputSpec
from losses import dice_loss, focal_loss, iou_mse
from sam import decoder, trainable, variants
from sam import encoder as sam_encoder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parts = ["encoder", "step", "loader", "iteration"]
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--config", type=Path, default=ROOT / "configs/demo.yaml", help="data to load")
    parser.add_argument("--model_type", choices=list(variants.VARIANTS), default="vit_b", help="SAM variant")
    parser.add_argument("--train", choices=["decoder", "lora", "encoder"], default="decoder", help="what")
    parser.add_argument("--grad_checkpointing", action="store_true", help="in our training encoder")
    parser.add_argument("--batch_size", type=int, default=4, help="samples per iteration")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=device, help="where to compute")
    parser.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="precision")
    parser.add_argument("--compile", choices=["on", "off"], default="off", help="in our whole iterations")
    parser.add_argument("--num_workers", type=int, default=1, help="data workers of whole iterations")
    parser.add_argument("--reuse", type=int, default=4, help="--embedding_reuse of the last row")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure")
    parser.add_argument("--without_plain", action="store_true", help="only ours, if plain takes too much")
    parser.add_argument("--seconds", type=float, default=20, help="about, for each number")
    args = parser.parse_args(argv)
    args.config = args.config.resolve()
    return args


def main() -> None:
    args = parse_args()
    print(
        f"{args.model_type}, {args.train}, batch {args.batch_size}, {args.device}, {os.cpu_count()} cores\n"
    )
    print("| | plain, images/s | this tool, images/s | ratio | plain, GB | this tool, GB |")
    print("|---|---|---|---|---|---|")

    def plain(function: Callable) -> tuple[float, float]:
        return (float("nan"),) * 2 if args.without_plain else fresh(function, args, True)

    if "encoder" in args.parts:
        encoded = compare("encoder", plain(encoder), fresh(encoder, args, False))
    if "step" in args.parts:  # from embeddings if the encoder is frozen, else from pictures
        compare(f"{args.train} step", plain(step), fresh(step, args, False))
    if "loader" in args.parts:
        compare("loader, one core", plain(loader), fresh(loader, args, False))
    if "iteration" in args.parts:
        slow = plain(iteration)
        for reuse in (1, args.reuse) if args.train == "decoder" else (1,):
            *ours, waited = fresh(run_command, args, reuse)
            compare(f"iteration, reuse {reuse}, data wait {waited:.0%}", slow, ours)
    if "encoder" in args.parts:
        work, (peak, _) = picture_flops(args) / 1e9, fresh(matrix_product, args)
        print(
            f"\nencoder: {work:.0f} GFLOP a picture, {work * encoded:.0f} GFLOP/s; "
            f"a large matrix product: {peak:.0f} GFLOP/s ({work * encoded / peak:.0%})"
        )


def compare(name: str, plain: tuple[float, float], ours: tuple[float, float]) -> float:
    """Print a row of the table from (images/s, peak memory in GB); returns our images/s."""
    speeds = f"{plain[0]:.2f} | {ours[0]:.2f} | {ours[0] / plain[0]:.1f}"
    print(f"| {name} | {speeds} | {plain[1]:.1f} | {ours[1]:.1f} |", flush=True)
    return ours[0]


# --- Measuring --------------------------------------------------------------------------------


def fresh(function: Callable, *args) -> tuple:
    """What `function(*args)` returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def rate(step: Callable[[], object], amount: float, args: argparse.Namespace) -> tuple[float, float]:
    """`amount` a second for one call of `step`, warmed up by as many as are timed at least, and peak GB."""
    least = 2 if args.seconds else 1
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    for _ in range(least):
        step()
    synchronize()
    start, calls = time.perf_counter(), 0
    while calls < least or time.perf_counter() - start < args.seconds:
        step()
        calls += 1
    synchronize()
    seconds = time.perf_counter() - start
    cuda = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else None
    return amount * calls / seconds, cuda or resident_memory(resource.RUSAGE_SELF)


def resident_memory(who: int) -> float:
    """Peak memory in GB of this process or of its largest child."""
    return resource.getrusage(who).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def build(args: argparse.Namespace, plain: bool) -> tuple[Sam, torch.dtype | None, torch.optim.Optimizer]:
    """A SAM with random weights on the device, its compute type, and an optimizer of what trains."""
    device = torch.device(args.device)
    sam = variants.VARIANTS[args.model_type].build().to(device).eval().requires_grad_(False)
    amp = None if plain else runtime.amp_dtype(args.amp, device)
    if not plain:
        sam_encoder.move_to_device(sam, device, amp, train=args.train)
    groups = trainable.prepare_training(
        sam,
        train=args.train,
        lr=1e-4,
        encoder_lr=1e-4,
        layer_decay=0.9,
        lora_rank=8,
        lora_alpha=16,
        grad_checkpointing=args.grad_checkpointing and not plain,
    )
    return sam, amp, torch.optim.AdamW(groups, lr=1e-4)


def random_pictures(sam: Sam, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    n, side = args.batch_size, sam.image_encoder.img_size
    images = torch.randint(0, 255, (n, side, side, 3), dtype=torch.uint8, device=args.device)
    return images, torch.tensor([[side, side]] * n, device=args.device)


@torch.no_grad()
def encoder(args: argparse.Namespace, plain: bool) -> tuple[float, float]:
    sam, amp, _ = build(args, plain)
    return rate(lambda: encode(sam, amp, *random_pictures(sam, args), args, plain), args.batch_size, args)


def encode(sam, amp, images, sizes, args, plain):
    if plain:
        return sam.image_encoder(sam_encoder.preprocess(images, sizes, args.model_type).contiguous())
    with runtime.autocast(torch.device(args.device), amp if args.train == "encoder" else None):
        return sam_encoder.encode(sam, images, sizes, args.model_type)


def step(args: argparse.Namespace, plain: bool) -> tuple[float, float]:
    sam, amp, optimizer = build(args, plain)
    n, (images, sizes) = args.batch_size, random_pictures(sam, args)
    side = sam.prompt_encoder.image_embedding_size[0]
    kept = torch.randn(n, 256, side, side, device=args.device, dtype=amp)
    target = torch.rand(n, 1, 4 * side, 4 * side, device=args.device)
    no_prompt = torch.zeros(n, 0, 2, device=args.device), torch.zeros(n, 0, device=args.device).long()

    def run():
        embeddings = kept if args.train == "decoder" else encode(sam, amp, images, sizes, args, plain)
        if plain:
            return plain_step(sam, optimizer, embeddings, target, sizes)
        with runtime.autocast(torch.device(args.device), amp):
            logits, iou_pred = decoder.decode(sam, embeddings, *no_prompt)
        return learn(sam, optimizer, logits.float(), iou_pred, target, sizes)

    return rate(run, n, args)


def plain_step(sam, optimizer, embeddings, target, sizes):
    outputs = []
    for embedding in embeddings:
        sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
        position = sam.prompt_encoder.get_dense_pe()
        outputs.append(sam.mask_decoder(embedding[None], position, sparse, dense, multimask_output=False))
    logits, iou_pred = map(torch.cat, zip(*outputs, strict=True))
    return learn(sam, optimizer, logits, iou_pred, target, sizes).item()


def learn(sam, optimizer, logits, iou_pred, target, sizes):
    valid = sam_encoder.valid_pixels(sizes, logits.shape[-1], logits.shape[-1] / sam.image_encoder.img_size)
    focal = focal_loss(logits, target, valid, alpha=0.7, gamma=2.0)
    loss = (20 * focal + dice_loss(logits, target, valid) + iou_mse(iou_pred, logits, target, valid)).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def make_train_set(args: argparse.Namespace, cache_bytes: int = 0) -> TrainSet:
    spec = InputSpec(256 if args.model_type == "lite_medsam" else 1024, 256)
    sources = index_datasets(list(load_config(args.config).dataset.train))
    return TrainSet(sources, spec=spec, prompt="none", seed=0, cache_bytes=cache_bytes)


def loader(args: argparse.Namespace, plain: bool) -> tuple[float, float]:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    train_set = make_train_set(args, cache_bytes=0 if plain else 1 << 31)
    for use in train_set.epoch(0):  # fills the cache, as any first epoch does
        train_set[use]
    uses = (use for epoch in range(1, 10**9) for use in train_set.epoch(epoch))
    return rate(lambda: train_set[next(uses)], 1, argparse.Namespace(device="cpu", seconds=args.seconds))


def iteration(args: argparse.Namespace, plain: bool) -> tuple[float, float]:
    sam, _, optimizer = build(args, plain)
    train_set = make_train_set(args)
    batches = train_set.batches(batch_size=args.batch_size, epochs=10**9, start=0)
    data = iter(DataLoader(train_set, batch_sampler=batches, num_workers=args.num_workers))

    def run():
        batch = {name: tensor.to(args.device) for name, tensor in next(data).items()}
        with torch.set_grad_enabled(args.train != "decoder"):
            embeddings = encode(sam, None, batch["image"], batch["size"], args, plain=True)
        plain_step(sam, optimizer, embeddings, batch["target"] / 255, batch["size"])

    return rate(run, args.batch_size, args)


def run_command(args: argparse.Namespace, reuse: int) -> tuple[float, float, float]:
    """finetune.py itself: images/s, peak memory in GB and share of waiting for data, from its curves.

    The first epoch, in which nothing can be reused, is left out.
    """
    per_epoch = -(-make_train_set(args).epoch_length // args.batch_size)
    names = ("config", "model_type", "batch_size", "device", "amp", "compile", "num_workers", "train")
    flags = {name: vars(args)[name] for name in names}
    flags |= {"checkpoint": "weights.pth", "exp_name": "bench", "embedding_reuse": reuse}
    flags |= {"log_interval": per_epoch, "epoch_num": 10**6, "test_interval": 10**9}
    command = [sys.executable, str(ROOT / "finetune.py")]
    command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    command += ["--grad_checkpointing"] * args.grad_checkpointing
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "errors", "w+") as errors:
        weights = variants.VARIANTS[args.model_type].build().state_dict()
        checkpoint.save_weights(weights, Path(folder) / "weights.pth")
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)
        curves, epochs = EventAccumulator(f"{folder}/exp/bench"), []
        while len(epochs) < reuse + 1 or epochs[-1].wall_time - epochs[0].wall_time < args.seconds:
            time.sleep(1)
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended: {Path(errors.name).read_text()[-2000:]}")
            if Path(curves.path).exists() and "train/data_wait" in curves.Reload().Tags()["scalars"]:
                epochs = curves.Scalars("train/images_per_s")[1:]
        process.kill()
        process.wait()
    used = len(epochs) // reuse * reuse  # epochs in which every sample was made anew equally often
    waited = np.mean([event.value for event in curves.Scalars("train/data_wait")[1:][-used:]])
    memory = resident_memory(resource.RUSAGE_CHILDREN)
    if args.device == "cuda":
        memory = curves.Scalars("train/gpu_memory_gb")[-1].value
    return 1 / np.mean([1 / event.value for event in epochs[-used:]]), memory, waited


def picture_flops(args: argparse.Namespace) -> float:
    """Floating point operations of the official encoder for one picture."""
    encoder = variants.VARIANTS[args.model_type].build().eval().image_encoder
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(encoder).to("meta")(torch.empty(1, 3, *[encoder.img_size] * 2, device="meta"))
    return counter.get_total_flops()


def matrix_product(args: argparse.Namespace) -> tuple[float, float]:
    """GFLOP/s of one large matrix product in the compute type."""
    dtype = runtime.amp_dtype(args.amp, torch.device(args.device)) or torch.float32
    side = 8192 if args.device == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=args.device).to(dtype)
    return rate(lambda: a @ b, 2 * side**3 / 1e9, args)


if __name__ == "__main__":
    main()
