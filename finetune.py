"""Fine-tune the Segment Anything Model to segment deformable linear objects (cables, wires, ropes).

    python finetune.py --config configs/demo.yaml --model_type lite_medsam --exp_name demo

The YAML file describes the data, the flags describe the training. See README.md.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from signal import SIGINT

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from segment_anything.modeling import Sam
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

import checkpoint
import runtime
from base import atomic
from base.atomic import MIB, require_free_space
from base.errors import UserError
from config import Config, load_config
from dataset import (
    DatasetIndex,
    TestSet,
    TrainSet,
    UnreadableFile,
    Use,
    find_leaks,
    index_datasets,
    test_loader,
    train_loader,
)
from embeddings import EmbeddingPool
from imaging.files import MAX_PIXELS, format_list
from imaging.geometry import InputSpec
from imaging.metrics import GroundTruth, ImageStats, aggregate, compute_stats
from imaging.prompts import PROMPT_KINDS
from imaging.visualize import draw_points, panel, sheet, shrink
from losses import cldice_loss, dice_loss, focal_loss, iou_mse
from preview import write_preview
from sam import decoder, encoder, trainable, variants

RESUME_FILE = "resume.pth"
FINER = 2  # how much finer than the decoder's grid the loss is, where the encoder learns to use it
METRICS_FILE = "metrics.jsonl"
SHOWN = 320  # longest side of a test picture as shown, in pixels
PANELS = 4  # pictures shown of the test set and of a training batch


# --- Command line -----------------------------------------------------------------------------


def positive_int(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def count(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def positive(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def not_negative(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number of at least 0")


def fraction(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < 1, "a number between 0 and 1, both excluded")


def layer_decay(text: str) -> float:
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0, at most 1")


def _number(text, kind, is_good, expected):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_good(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def folder_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.+=@ -]*", text):
        raise argparse.ArgumentTypeError(
            f"expected the name of a folder inside exp/, without separators, got {text!r}"
        )
    return text


# What a resumed run may set anew: nothing that changes which samples come or what is computed on them.
# (Another epoch_num stretches or shortens the rest of the learning rate's decay.)
MAY_CHANGE = (
    "config",
    "epoch_num",
    "device",
    "num_workers",
    "cache_mb",
    "save_interval",
    "keep_last",
    "resume_interval",
    "max_bad_steps",
    "max_pixels",
    "test_interval",
    "log_interval",
)


# Flags whose default depends on --train: for "decoder", and where the encoder learns too. (Their help ends
# with "%(default).0s", nothing, so that argparse does not say that the default is None.)
DEFAULTS = (("lr", 1e-3, 5e-4), ("batch_size", 4, 1), ("alpha", 0.7, 0.5))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune SAM to segment cables.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_run_flags(parser.add_argument_group("run"))
    _add_saving_flags(parser.add_argument_group("saving"))
    _add_speed_flags(parser.add_argument_group("speed"))
    _add_model_flags(parser.add_argument_group("model"))
    _add_optimisation_flags(parser.add_argument_group("optimization"))
    _add_loss_flags(parser.add_argument_group("loss"))
    args = parser.parse_args(argv)
    for name, of_decoder, where_the_encoder_learns in DEFAULTS:
        if getattr(args, name) is None:
            setattr(args, name, of_decoder if args.train == "decoder" else where_the_encoder_learns)
    if args.encoder_lr is None:
        args.encoder_lr = args.lr * (2 if args.train == "lora" else 0.5)
    if args.embedding_reuse > 1 and args.train != "decoder":
        parser.error(f"--embedding_reuse above 1 needs a frozen encoder, but --train is {args.train}")
    if args.resume and args.exp_name is None:
        parser.error("--resume needs the --exp_name of the run to go on with")
    if args.exp_name is None:
        args.exp_name = f"{args.config.stem}_{datetime.now():%Y%m%d-%H%M%S}"
    return args


def _add_run_flags(run: argparse._ArgumentGroup) -> None:
    run.add_argument(
        "-c",
        "--config",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="YAML file that describes the data",
    )
    run.add_argument(
        "-n",
        "--exp_name",
        type=folder_name,
        help="results go to exp/EXP_NAME (default %(default)s: config name and time)",
    )
    run.add_argument(
        "--preview",
        action="store_true",
        help="train nothing: check the data and show it in exp/NAME/preview/",
    )
    run.add_argument("--seed", type=count, default=0, help="of every random choice")
    run.add_argument(
        "--max_pixels", type=positive_int, default=MAX_PIXELS, help="of a picture; larger ones are refused"
    )
    run.add_argument(
        "--test_interval", type=positive_int, default=100, help="iterations (batches) between tests"
    )
    run.add_argument(
        "--log_interval", type=positive_int, default=10, help="iterations between logged scalars"
    )


def _add_saving_flags(saving: argparse._ArgumentGroup) -> None:
    saving.add_argument(
        "--resume",
        action="store_true",
        help="go on with exp/EXP_NAME from its last saved state; flags and data must be the same but "
        f"for {', '.join(MAY_CHANGE)}",
    )
    saving.add_argument(
        "--resume_interval",
        type=positive,
        default=10.0,
        metavar="MINUTES",
        help="between states for --resume; one is also saved at every test and checkpoint, and when the run "
        "is interrupted",
    )
    saving.add_argument(
        "-s", "--save_interval", type=positive_int, default=10, help="epochs between checkpoints"
    )
    saving.add_argument(
        "--keep_last", type=positive_int, metavar="N", help="epochs' checkpoints to keep; %(default)s: all"
    )


def _add_speed_flags(speed: argparse._ArgumentGroup) -> None:
    speed.add_argument(
        "--device",
        choices=["auto", "cuda", "mps", "cpu"],
        default="auto",
        help="where to compute; auto takes the first there is",
    )
    speed.add_argument(
        "--amp",
        choices=["auto", "bf16", "fp16", "off"],
        default="auto",
        help="mixed precision; auto: bf16 where the hardware computes in it, fp16 on older CUDA",
    )
    speed.add_argument(
        "--compile",
        choices=["auto", "on", "off"],
        default="auto",
        help="compile encoder and decoder; takes a minute and a C++ compiler; auto: for long runs on CUDA",
    )
    speed.add_argument(
        "--embedding_reuse",
        type=positive_int,
        default=1,
        metavar="R",
        help="use every composite and its embedding in R epochs, with new prompts each time, so that an "
        "epoch encodes only 1/R of its samples",
    )
    speed.add_argument(
        "--num_workers",
        type=count,
        default=_default_workers(),
        help="processes that prepare data; 0: the main one",
    )
    speed.add_argument(
        "--cache_mb", type=count, default=2048, help="memory for decoded files, shared by the data workers"
    )


def _add_model_flags(net: argparse._ArgumentGroup) -> None:
    net.add_argument("--model_type", choices=list(variants.VARIANTS), default="vit_b", help="SAM variant")
    net.add_argument(
        "--checkpoint",
        type=Path,
        help="weights to start from, official or this tool's (default %(default)s: the published ones)",
    )
    net.add_argument(
        "--train",
        choices=["decoder", "lora", "encoder"],
        default="decoder",
        help="what learns: the mask decoder alone, or also low-rank adapters in the encoder, or all of it",
    )
    net.add_argument("--lora_rank", type=positive_int, default=8, help="of the adapters")
    net.add_argument("--lora_alpha", type=positive, default=16.0, help="adapters count alpha / rank times")
    net.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="keep less of a training encoder in memory, and compute it again",
    )
    net.add_argument(
        "--prompt",
        choices=PROMPT_KINDS,
        default="none",
        help="what the decoder is told: nothing, 1 to 3 points, a box, or one of these per sample",
    )


def _add_optimisation_flags(optim: argparse._ArgumentGroup) -> None:
    optim.add_argument("-e", "--epoch_num", type=positive_int, default=50, help="epochs to train")
    optim.add_argument(
        "-b",
        "--batch_size",
        type=positive_int,
        help="samples per iteration (default: 4, or 1 where the encoder learns too)%(default).0s",
    )
    optim.add_argument(
        "--virtual_batch_size",
        type=positive_int,
        default=1,
        help="batches per optimizer step; the actual batch is batch_size x virtual_batch_size",
    )
    optim.add_argument(
        "--lr",
        type=positive,
        help="maximum learning rate (default: 1e-3, or 5e-4 where the encoder learns too)%(default).0s",
    )
    optim.add_argument(
        "--encoder_lr",
        type=positive,
        help="that of the encoder, or of its adapters (default: half of --lr, or twice it)%(default).0s",
    )
    optim.add_argument(
        "--layer_decay",
        type=layer_decay,
        default=0.9,
        help="--train encoder: factor on the rate for every block further from the output",
    )
    optim.add_argument("--warmup_steps", type=count, default=10, help="optimizer steps of linear warm-up")
    optim.add_argument(
        "--lr_power", type=not_negative, default=1.0, help="power of the decay after warm-up; 0: constant"
    )
    optim.add_argument("--weight_decay", type=not_negative, default=0.01, help="of AdamW")
    optim.add_argument("--grad_clip", type=positive, default=1.0, help="largest norm of the gradient")
    optim.add_argument(
        "--max_bad_steps",
        type=positive_int,
        default=10,
        help="steps in a row with a loss or gradient that is not finite, which end the run; "
        "one alone is left out",
    )


def _add_loss_flags(loss: argparse._ArgumentGroup) -> None:
    loss.add_argument(
        "--alpha",
        type=fraction,
        help="focal loss: weight of foreground, background has 1 - alpha "
        "(default: 0.7, or 0.5 where the encoder learns too)%(default).0s",
    )
    loss.add_argument("--gamma", type=not_negative, default=2.0, help="focal loss: focusing power")
    loss.add_argument("--focal_weight", type=not_negative, default=20.0, help="of the focal loss in the sum")
    loss.add_argument("--dice_weight", type=not_negative, default=1.0, help="of the Dice loss in the sum")
    loss.add_argument(
        "--iou_weight", type=not_negative, default=1.0, help="of the IoU head's squared error in the sum"
    )
    loss.add_argument(
        "--cldice_weight",
        type=not_negative,
        default=0.0,
        help="of the clDice loss in the sum, which is for cables without gaps",
    )


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores - 1))


# --- Schedule ---------------------------------------------------------------------------------


def learning_rate(step: int, *, total_steps: int, peak: float, warmup: int, power: float) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then power decay."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 - (step - warmup) / (total_steps - warmup)) ** power


@dataclass(frozen=True)
class Schedule:
    """How samples make iterations (batches, of all processes), and iterations make optimizer steps."""

    epoch_length: int
    batch_size: int
    virtual_batch_size: int
    epochs: int

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.epoch_length // self.batch_size)

    @property
    def iterations(self) -> int:
        return self.epochs * self.batches_per_epoch

    @property
    def steps(self) -> int:
        return self.epochs * -(-self.batches_per_epoch // self.virtual_batch_size)

    def samples_in_batch(self, batch: int) -> int:
        """Samples of the epoch's batch `batch` (from 0)."""
        return min(self.batch_size, self.epoch_length - batch * self.batch_size)

    def samples_in_step(self, batch: int) -> int:
        """Samples of the optimizer step that the epoch's batch `batch` (from 0) belongs to."""
        whole = self.batch_size * self.virtual_batch_size
        start = batch // self.virtual_batch_size * whole
        return min(whole, self.epoch_length - start)

    def ends_step(self, batch: int) -> bool:
        """Whether the optimizer steps after the epoch's batch `batch` (from 0)."""
        return (batch + 1) % self.virtual_batch_size == 0 or batch + 1 == self.batches_per_epoch

    def is_amid_step(self, iterations: int) -> bool:
        """Whether after so many iterations there are gradients that wait for the rest of their step."""
        batch = iterations % self.batches_per_epoch
        return batch > 0 and not self.ends_step(batch - 1)


# --- Before training --------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """All that training needs, checked; nothing is written before it exists."""

    config: Config
    train_set: TrainSet
    test_set: TestSet | None
    model_type: str
    train: str
    sam: Sam
    loaded: dict[str, Tensor]
    device: torch.device
    amp: torch.dtype | None
    compile: bool
    folder: Path
    resume: dict | None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def sources(self) -> list[DatasetIndex]:
        return [*self.train_set.sources, *([self.test_set.source] if self.test_set else [])]

    def encode(self, images: Tensor, sizes: Tensor) -> Tensor:
        """`encoder.encode` on the device; an encoder that trains in float32 computes in the compute type."""
        with runtime.autocast(self.device, self.amp if self.train == "encoder" else None):
            return encoder.encode(self.sam, images.to(self.device), sizes.to(self.device), self.model_type)


@dataclass
class Progress:
    """Where a run stands: with the weights and the optimizer's state all that it needs to go on.

    `loss_sums` (4,) and `samples` count since the last log. `bad_steps` counts the optimizer steps left
    out, `bad_in_row` the last of them. `baseline` and `best` are what `test` returned.
    """

    loss_sums: Tensor
    samples: int = 0
    iteration: int = 0
    step: int = 0
    bad_steps: int = 0
    bad_in_row: int = 0
    baseline: dict[str, float] | None = None
    best: dict[str, float] | None = None


def preview(args: argparse.Namespace) -> None:
    """What `--preview` does, without weights; raises as `prepare` does."""
    config = load_config(args.config)
    sources, test_source = find_data(args, config)
    variant = variants.VARIANTS[args.model_type]
    write_preview(
        sources,
        test_source,
        spec=InputSpec(variant.img_size, variant.mask_grid),
        prompt=args.prompt,
        seed=args.seed,
        folder=Path("exp") / args.exp_name / "preview",
    )


def find_data(args: argparse.Namespace, config: Config) -> tuple[list[DatasetIndex], DatasetIndex | None]:
    """The sources to train on and the one to test on, all checked; warns of photos that are in both."""
    test_config = config.dataset.test
    configs = [*config.dataset.train, *([test_config] if test_config else [])]
    sources = index_datasets(configs, max_pixels=args.max_pixels)
    test_source = sources.pop() if test_config else None
    if test_source:
        warn_of_leaks(sources, test_source)
    return sources, test_source


def prepare(args: argparse.Namespace) -> Setup:
    """Check every input and build the model. Raises UserError for a user's mistake."""
    folder = Path("exp") / args.exp_name
    if not args.resume and folder.exists() and any(path.name != "preview" for path in folder.iterdir()):
        raise UserError(
            f"{folder} already holds a run; choose another --exp_name, remove it, or go on with --resume"
        )
    device = runtime.join_process_group(runtime.pick_device(args.device))
    config = load_config(args.config)
    resume = checkpoint.load_resume_state(folder / RESUME_FILE) if args.resume else None
    if resume:
        check_same_run(resume, args, config)
    sources, test_source = find_data(args, config)
    if resume:
        check_same_files(resume, [*sources, *([test_source] if test_source else [])])

    amp = runtime.amp_dtype(args.amp, device)
    path = args.checkpoint or variants.pretrained_path(args.model_type)
    loaded = checkpoint.load_weights(path)
    sam = variants.VARIANTS[args.model_type].build()
    variants.load_state_dict(sam, loaded, args.model_type, path)
    encoder.move_to_device(sam, device, amp, train=args.train)

    spec = InputSpec(sam.image_encoder.img_size, decoder.mask_grid(sam))
    test_set = None
    if test_source:
        test_set = TestSet(test_source, spec=spec, prompt=args.prompt, seed=args.seed)
    train_set = make_train_set(args, sources, spec, pool_layout(sam, amp), folder)
    pictures = args.epoch_num * train_set.epoch_length // args.embedding_reuse
    return Setup(
        config=config,
        train_set=train_set,
        test_set=test_set,
        model_type=args.model_type,
        train=args.train,
        sam=sam,
        loaded=loaded,
        device=device,
        amp=amp,
        compile=compiles(args.compile, device, pictures),
        folder=folder,
        resume=resume,
    )


def make_train_set(
    args: argparse.Namespace, sources: list[DatasetIndex], spec: InputSpec, layout: dict, folder: Path
) -> TrainSet:
    """The training samples; raises UserError if --embedding_reuse needs more disk than there is."""
    if args.train != "decoder":
        spec = replace(spec, mask_grid=FINER * spec.mask_grid)
    options = {"spec": spec, "prompt": args.prompt, "seed": args.seed, "reuse": args.embedding_reuse}
    options |= {"cache_bytes": args.cache_mb * MIB}
    keep_photos = args.epoch_num > 1 and args.train == "decoder"
    train_set = TrainSet(sources, **options, keep_photos=keep_photos)
    try:
        require_free_space(folder, EmbeddingPool.size(train_set.places, **layout), "keeping the embeddings")
    except UserError as error:
        if args.embedding_reuse > 1:
            raise
        warnings.warn(f"{error}: photos are encoded anew in every epoch", stacklevel=2)
        train_set = TrainSet(sources, **options)
    return train_set


def pool_layout(sam: Sam, amp: torch.dtype | None) -> dict:
    """How an `EmbeddingPool` of the run keeps a sample: float16, or float32 where nothing may be rounded."""
    return {
        "shape": (sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size),
        "dtype": np.dtype(np.float16 if amp else np.float32),
        "grid": decoder.mask_grid(sam),
    }


# Pictures to encode from which on "auto" compiles. Not measured on CUDA: a minute of compiling
# against an encoder that gets, say, a quarter faster than its 150 pictures a second.
COMPILE_PAYS = 40_000


def compiles(choice: str, device: torch.device, pictures: int) -> bool:
    """Whether to compile, for a run that encodes so many pictures.

    Raises UserError if it is asked for and torch.compile finds no C++ compiler.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")
    if choice == "on" and not compiler:
        raise UserError("--compile on: needs a C++ compiler (g++ or clang++), and none is found")
    long_on_cuda = device.type == "cuda" and pictures >= COMPILE_PAYS and compiler is not None
    return choice == "on" or (choice == "auto" and long_on_cuda)


def check_same_run(resume: dict, args: argparse.Namespace, config: Config) -> None:
    """Raise ValueError naming both values of every flag or data setting that may not change."""
    if "files" not in resume:
        raise UserError(f"exp/{args.exp_name}/{RESUME_FILE} is not a state that this version saved")
    faults = [
        f"--{name}: was {resume['flags'].get(name)}, is now {value}"
        for name, value in settings(args).items()
        if name not in MAY_CHANGE and resume["flags"].get(name) != value
    ]
    if resume["processes"] != runtime.world_size():
        faults.append(f"processes: were {resume['processes']}, are now {runtime.world_size()}")
    if resume["config"] != (now := config.model_dump_json()):
        faults.append(f"the data: was {resume['config']}, is now {now}")
    if faults:
        raise UserError("\n  ".join([f"exp/{args.exp_name} cannot go on with other settings:", *faults]))


def check_same_files(resume: dict, sources: list[DatasetIndex]) -> None:
    """Raise ValueError that names the files which are not what they were."""
    was, now = resume["files"], file_digests(sources)
    changed = sorted(path for path in was.keys() | now.keys() if was.get(path) != now.get(path))
    if changed:
        raise UserError(f"cannot go on, for not all files are what they were:\n  {format_list(changed)}")


def file_digests(sources: list[DatasetIndex]) -> dict[str, str]:
    return {str(path): facts.digest for source in sources for path, facts in source.facts.items()}


def warn_of_leaks(train_sources: list[DatasetIndex], test_source: DatasetIndex) -> None:
    """Warn of photos that are both trained and tested on."""
    shared = [f"{test} = {train}" for test, train in find_leaks(train_sources, test_source)]
    if shared and runtime.is_main():
        warnings.warn(
            "photos to test on are also trained on, so that the test measures memory:\n  "
            f"{format_list(shared)}",
            stacklevel=2,
        )


def print_summary(args: argparse.Namespace, setup: Setup, schedule: Schedule) -> None:
    """Say in a few lines what is about to run."""
    print(f"{'dataset':40} {'pairs':>6} {'backgrounds':>12} {'augmented':>10} {'percentage':>11}")
    for source in setup.sources:
        config = source.config
        role = "test" if setup.test_set and source is setup.test_set.source else "train"
        print(
            f"{role + ' ' + shorten(str(config.data_dir), 34):40} {len(source.pairs):6} "
            f"{len(source.backgrounds):12} {config.w_aug!s:>10} {config.percentage:11g}"
        )
    trainable = sum(p.numel() for p in setup.sam.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in setup.sam.parameters()) - trainable
    precision = str(setup.amp).removeprefix("torch.") if setup.amp else "float32"
    print(
        f"training    {schedule.epochs} epochs of {schedule.epoch_length} samples: "
        f"{schedule.iterations} iterations, {schedule.steps} optimizer steps\n"
        f"model       {args.model_type}, prompt {args.prompt}, training the {args.train}: "
        f"{trainable / 1e6:.2f} M parameters trained, {frozen / 1e6:.2f} M frozen\n"
        f"device      {setup.device}, {precision}{', compiled' * setup.compile}, "
        f"{args.num_workers} data workers\n"
        f"results     {setup.folder}"
    )
    if setup.train_set.places:
        size = EmbeddingPool.size(setup.train_set.places, **pool_layout(setup.sam, setup.amp))
        print(
            f"embeddings  {size / MIB:.0f} MiB on disk until the end; "
            f"composites are used in {args.embedding_reuse} epoch(s), unchanging photos in all"
        )


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else "..." + text[3 - length :]


# --- Test -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedTest:
    """A test sample with its embedding, which a frozen encoder computes once per run.

    `embedding` (1, 256, e, e) rests on the CPU in the compute type, 2 MiB in bf16; it is None if the
    encoder trains, which then needs `image` uint8 (1, S, S, 3), the model's input. `picture` is RGB uint8,
    small enough to show.
    """

    image: Tensor | None
    embedding: Tensor | None
    points: Tensor
    labels: Tensor
    size: tuple[int, int]
    truth: GroundTruth
    picture: np.ndarray


def encode_test_set(args: argparse.Namespace, setup: Setup) -> list[EncodedTest]:
    """Read this process's share of the test samples; encode them if their embeddings will stay the same."""
    part = {"part": runtime.rank(), "parts": runtime.world_size()}
    loader = test_loader(setup.test_set, num_workers=args.num_workers, **part)
    encoded = []
    for sample in tqdm(loader, "encoding the test set", leave=False, disable=not runtime.is_main()):
        image, size = sample["image"][None], sample["size"][None]
        embedding = setup.encode(image, size).cpu() if setup.train == "decoder" else None
        encoded.append(
            EncodedTest(
                image if embedding is None else None,
                embedding,
                sample["points"][None],
                sample["labels"][None],
                tuple(sample["size"].tolist()),
                GroundTruth.from_mask(sample["truth"].numpy()),
                shrink(sample["picture"].numpy(), SHOWN),
            )
        )
    return encoded


@torch.no_grad()
def predict(setup: Setup, tests: list[EncodedTest], batch_size: int) -> Iterator[np.ndarray]:
    """Predicted logits, float32 (H, W) at each picture's own resolution."""
    sam, device = setup.sam, setup.device
    for start in range(0, len(tests), batch_size):
        batch = tests[start : start + batch_size]
        points = torch.cat([test.points for test in batch]).to(device)
        labels = torch.cat([test.labels for test in batch]).to(device)
        if setup.train == "decoder":
            embeddings = torch.cat([test.embedding for test in batch]).to(device)
        else:
            sizes = torch.tensor([test.size for test in batch])
            embeddings = setup.encode(torch.cat([test.image for test in batch]), sizes)
        with runtime.autocast(device, setup.amp):
            logits, _ = decoder.decode(sam, embeddings, points, labels)
        for test, low_res_logits in zip(batch, logits.float(), strict=True):
            upscaled = decoder.upscale(sam, low_res_logits[None], test.size, test.truth.mask.shape)
            yield upscaled[0, 0].cpu().numpy()


def evaluate(
    setup: Setup, tests: list[EncodedTest], batch_size: int
) -> tuple[list[ImageStats], list[np.ndarray]]:
    """Measures of this process's test pictures, and for each a panel to show."""
    measured, panels = [], []
    for test, logits in zip(tests, predict(setup, tests, batch_size), strict=True):
        measured.append(compute_stats(logits, test.truth))
        panels.append(show_test(test, logits > 0))
    return measured, panels


def show_test(test: EncodedTest, prediction: np.ndarray) -> np.ndarray:
    """Image | truth | prediction of a test sample, with its prompt drawn, small."""
    scale = max(test.picture.shape) / max(test.size)
    picture = draw_points(test.picture, test.points[0].numpy() * scale, test.labels[0].numpy())
    return panel(picture, shrink(test.truth.mask, SHOWN), shrink(prediction, SHOWN))


def show_train(sam: Sam, train_set: TrainSet, uses: list[Use], logits: Tensor) -> np.ndarray:
    """The same of the first samples of a training batch, in the model's input frame."""
    panels = []
    for use, predicted in zip(uses[:PANELS], logits.detach().cpu(), strict=False):
        sample = train_set[use]
        height, width = size = tuple(sample["size"].tolist())
        picture = sample["image"].numpy()[:height, :width]
        prompt = sample["points"].numpy(), sample["labels"].numpy()
        truth, prediction = (
            decoder.upscale(sam, low_res[None], size, size)[0, 0].numpy()
            for low_res in (sample["target"] / 255 - 0.5, predicted)
        )
        panels.append(panel(draw_points(picture, *prompt), truth > 0, prediction > 0))
    return sheet(panels)


# --- Embeddings -------------------------------------------------------------------------------


def embedded_batches(
    args: argparse.Namespace, setup: Setup, start: int
) -> Iterator[tuple[list[Use], dict[str, Tensor] | None, float]]:
    """The run's batches from iteration `start`, on the device, with their embeddings.

    Samples are made and encoded in the order of their first use. Where any are used again they go
    through an `EmbeddingPool`, which is but a cache: a resumed run makes anew what it needs.

    Yields:
        This process's uses of the batch; unless there are none, `embedding` (B, C, e, e), `target` uint8
        (B, 1, grid, grid), `size`, `points` and `labels`; and the seconds that it waited for data.
    """
    train_set, parts = setup.train_set, runtime.world_size()
    span = {"batch_size": args.batch_size * parts, "epochs": args.epoch_num, "start": start}
    span |= {"part": runtime.rank(), "parts": parts}
    made = encoded_samples(args, setup, span)
    pool = None
    if train_set.places:
        pool = EmbeddingPool(setup.folder, train_set.places, **pool_layout(setup.sam, setup.amp))
    for uses in train_set.batches(**span):
        if not uses:
            yield uses, None, 0.0
            continue
        if pool is None:
            yield next(made)
            continue
        waited = 0.0
        while not all(pool.holds(use) for use in uses):
            made_uses, samples, seconds = next(made)
            put_in_pool(pool, made_uses, samples)
            waited += seconds
        batch = to_device(from_pool(pool, train_set, uses), setup.device)
        batch["embedding"] = batch["embedding"].to(setup.amp or torch.float32)
        yield uses, batch, waited


def encoded_samples(
    args: argparse.Namespace, setup: Setup, span: dict[str, int]
) -> Iterator[tuple[list[Use], dict[str, Tensor], float]]:
    """What has to be made for the batches of `span`, as `embedded_batches` yields it."""
    options = {"num_workers": args.num_workers, "pin_memory": setup.device.type == "cuda"}
    loader = train_loader(setup.train_set, **span, **options)
    asked = time.perf_counter()
    for uses, samples in zip(setup.train_set.batches_to_make(**span), loader, strict=True):
        waited = time.perf_counter() - asked
        samples = to_device(samples, setup.device)
        samples["embedding"] = setup.encode(samples.pop("image"), samples["size"])
        yield uses, samples, waited
        asked = time.perf_counter()


def put_in_pool(pool: EmbeddingPool, uses: list[Use], samples: dict[str, Tensor]) -> None:
    parts = (samples[name].cpu() for name in ("embedding", "target", "size"))
    for use, *sample in zip(uses, *parts, strict=True):
        pool.put(use, *sample)


def from_pool(pool: EmbeddingPool, train_set: TrainSet, uses: list[Use]) -> dict[str, Tensor]:
    """A batch of kept samples, each with the prompt of this use."""
    embeddings, targets, sizes = zip(*map(pool.get, uses), strict=True)
    prompts = [train_set.draw_prompt(*sample) for sample in zip(uses, targets, sizes, strict=True)]
    return {
        "embedding": torch.stack(embeddings),
        "target": torch.stack(targets),
        "size": torch.stack(sizes),
        "points": torch.stack([prompt["points"] for prompt in prompts]),
        "labels": torch.stack([prompt["labels"] for prompt in prompts]),
    }


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch without waiting for it, from pinned memory where the device is a CUDA one."""
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def compiled(function: Callable, batch_size: int) -> Callable:
    """`function(..., batch)` compiled for whole batches.

    An epoch's last, smaller batch runs as it is: to compile for it would take longer than it saves.
    """
    fast = torch.compile(function, dynamic=False)
    return lambda *args: (fast if len(args[-1]) == batch_size else function)(*args)


# --- Training ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 for a mistake of the user's."""
    runtime.init()
    args = parse_args(argv)
    try:
        if args.preview:
            preview(args)
            return 0
        setup = prepare(args)
        runtime.barrier()
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    code = run_to_the_end(args, setup)
    if code and runtime.is_main() and (setup.folder / RESUME_FILE).exists():
        print(
            f"--exp_name {args.exp_name} --resume, with the other flags as they were, goes on from the last "
            f"state, in {setup.folder / RESUME_FILE}",
            file=sys.stderr,
        )
    return code


def run_to_the_end(args: argparse.Namespace, setup: Setup) -> int:
    """Train; returns 0, 1 after a message of what ended the run, or 128 and the number of a signal."""
    stop, error = runtime.StopRequest(), None
    try:
        with stop:
            train(args, setup, stop)
    except KeyboardInterrupt:  # the second signal, which does not wait
        stop.signal = stop.signal or SIGINT
    except (RunError, UnreadableFile) as fault:
        error = fault
    except (UserError, OSError) as fault:  # TensorBoard's name no file
        error = f"writing to {setup.folder} failed: {fault}"
    except RuntimeError as fault:
        error = as_run_error(fault)
        if error is fault:
            raise
    runtime.leave_process_group()
    if stop.signal:
        return 128 + stop.signal
    if error:
        print(f"error: {error}", file=sys.stderr)
    return 1 if error else 0


class RunError(Exception):
    """What ends a run on its way; its message is for the user."""


@dataclass
class Run:
    """A run under way: what it has beside its `Setup`. Only the main process has a writer."""

    schedule: Schedule
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    decode: Callable
    writer: SummaryWriter | None = None
    tests: list[EncodedTest] = field(default_factory=list)


def start(args: argparse.Namespace, setup: Setup) -> Run:
    """Set up what trains, from the state to resume if there is one, and open `setup.folder`."""
    sam, amp = setup.sam, setup.amp
    torch.manual_seed(args.seed)
    groups = trainable.prepare_training(
        sam,
        train=args.train,
        lr=args.lr,
        encoder_lr=args.encoder_lr,
        layer_decay=args.layer_decay,
        lora_rank=args.lora_rank,
        lora_alpha=args.lora_alpha,
        grad_checkpointing=args.grad_checkpointing,
    )
    batch_size = args.batch_size * runtime.world_size()
    run = Run(
        Schedule(setup.train_set.epoch_length, batch_size, args.virtual_batch_size, args.epoch_num),
        [parameter for group in groups for parameter in group["params"]],
        torch.optim.AdamW(groups, weight_decay=args.weight_decay),
        torch.amp.GradScaler(setup.device.type, enabled=amp is torch.float16),
        Progress(loss_sums=torch.zeros(4, device=setup.device)),
        decoder.decode,
    )
    if setup.resume:
        load_state(setup, run)
    if runtime.is_main():
        print_summary(args, setup, run.schedule)
        if setup.resume:
            print(f"resumed     after iteration {run.progress.iteration}")
        setup.checkpoints.mkdir(parents=True, exist_ok=args.resume)
        write_settings(args, setup)
        purge_step = run.progress.iteration + 1 if setup.resume else None
        run.writer = SummaryWriter(setup.folder, purge_step=purge_step)
        log_settings(run.writer, args, run.progress.iteration)
    runtime.barrier()
    if setup.compile:
        at_once = 1 if setup.device.type == "cpu" else args.batch_size
        sam.image_encoder.forward = compiled(sam.image_encoder.forward, at_once)
        run.decode = compiled(decoder.decode, args.batch_size)
    if setup.test_set:
        run.tests = encode_test_set(args, setup)
    return run


def train(args: argparse.Namespace, setup: Setup, stop: runtime.StopRequest) -> None:
    """Train what `--train` says, test on the way, and write `setup.folder`.

    Ends early, with its state saved, once `stop` notes a signal. Raises RunError, which names the cause,
    if it cannot go on.
    """
    run = start(args, setup)
    schedule, progress, optimizer, scaler = run.schedule, run.progress, run.optimizer, run.scaler
    is_main = runtime.is_main()
    if setup.test_set and not setup.resume:
        progress.baseline = test(args, setup, run)

    grid = setup.train_set.spec.mask_grid
    weights = [args.focal_weight, args.dice_weight, args.iou_weight, args.cldice_weight]
    weights = torch.tensor(weights, device=setup.device)
    saved_at = time.monotonic()
    first = progress.iteration + 1
    seen, waited, clock = 0, 0.0, time.perf_counter()
    bar = tqdm(
        total=schedule.iterations,
        initial=progress.iteration,
        unit="it",
        dynamic_ncols=True,
        disable=not is_main,
    )
    batches = embedded_batches(args, setup, progress.iteration)
    while True:
        # the next batch; where there is none to be had, nothing of the run is lost
        try:
            uses, batch, wait = next_batch(batches)
        except StopIteration:
            break
        except RunError:
            if runtime.world_size() == 1:  # else the others are further, or wait for this one
                save_state(args, setup, run)
            raise
        epoch, batch_index = divmod(progress.iteration, schedule.batches_per_epoch)
        progress.iteration += 1
        last = progress.iteration == schedule.iterations

        # learning rates of this optimizer step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                progress.step,
                total_steps=schedule.steps,
                peak=group["peak_lr"],
                warmup=args.warmup_steps,
                power=args.lr_power,
            )

        # forward; losses in float32, on the targets' grid, away from padding
        losses = torch.zeros(len(weights), device=setup.device)
        if uses:
            with runtime.autocast(setup.device, setup.amp):
                logits, iou_pred = run.decode(setup.sam, batch["embedding"], batch["points"], batch["labels"])
            target = batch["target"].float() / 255
            logits = logits.float()
            if logits.shape != target.shape:
                logits = F.interpolate(logits, target.shape[2:], mode="bilinear")
            valid = encoder.valid_pixels(batch["size"], grid, grid / setup.train_set.spec.img_size)
            losses = loss_sums(args, logits, iou_pred, target, valid)
            # backward; sums over samples, so that every sample of the step weighs the same
            scaler.scale((weights * losses).sum() / schedule.samples_in_step(batch_index)).backward()

        # step, once the batches of a step are through
        if schedule.ends_step(batch_index):
            runtime.all_reduce_gradients(run.parameters)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(run.parameters, args.grad_clip)
            if is_good := bool(norm.isfinite()):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            progress.step += 1
            progress.bad_steps += not is_good
            progress.bad_in_row = 0 if is_good else progress.bad_in_row + 1
            if progress.bad_in_row == args.max_bad_steps:
                raise RunError(bad_steps_message(progress, setup, uses))

        # log; reading the sums waits for the device, hence not at every iteration
        bar.update()
        losses = losses.detach()
        runtime.all_reduce_sum([losses])
        progress.loss_sums += losses
        progress.samples += schedule.samples_in_batch(batch_index)
        seen, waited = seen + schedule.samples_in_batch(batch_index), waited + wait
        if progress.iteration % args.log_interval == 0 or last:
            elapsed = time.perf_counter() - clock
            speed = {"train/images_per_s": seen / elapsed, "train/data_wait": waited / elapsed}
            bar.set_postfix_str(log(run, weights, speed))
            progress.loss_sums.zero_()
            progress.samples = 0
        if progress.iteration % args.log_interval == 0 or progress.iteration == first:
            # the clock starts anew; not in what it shows: the first iteration, which warms up
            seen, waited, clock = 0, 0.0, time.perf_counter()

        # test and save; the clock of images/s stands still
        paused = time.perf_counter()
        tested = progress.iteration % args.test_interval == 0 or last
        if tested and setup.test_set:
            result = test(args, setup, run)
            is_best = progress.best is None or result["iou"] > progress.best["iou"]
            if is_best and all(weight.isfinite().all() for weight in run.parameters):
                progress.best = result
                log_best(run)
                save_weights(setup, "best.pth")
        saved = batch_index + 1 == schedule.batches_per_epoch and (epoch + 1) % args.save_interval == 0
        if saved:
            save_weights(setup, f"epoch_{epoch + 1:04d}.pth")
            remove_old(setup.checkpoints, args.keep_last)
        if last:
            save_weights(setup, "last.pth")
        state_is_old = time.monotonic() - saved_at >= 60 * args.resume_interval
        ending, state_is_old = runtime.all_reduce_max([stop.signal or 0, int(state_is_old)])
        if tested or saved or state_is_old or ending:
            save_state(args, setup, run)
            saved_at = time.monotonic()
        if tested and is_main:  # after the state is safe, for this reads files again
            picture = show_train(setup.sam, setup.train_set, uses, logits)
            run.writer.add_image("train/panel", picture, progress.iteration, dataformats="HWC")
        clock += time.perf_counter() - paused
        if ending:
            stop.signal = ending
            break
    bar.close()
    if is_main:
        run.writer.close()
        print_result(progress, setup.checkpoints)


def loss_sums(
    args: argparse.Namespace, logits: Tensor, iou_pred: Tensor, target: Tensor, valid: Tensor
) -> Tensor:
    """Focal, Dice, IoU-head and clDice losses (4,), summed over samples; the last is 0 unless it counts."""
    parts = [
        focal_loss(logits, target, valid, alpha=args.alpha, gamma=args.gamma).sum(),
        dice_loss(logits, target, valid).sum(),
        iou_mse(iou_pred, logits, target, valid).sum(),
        cldice_loss(logits, target, valid).sum() if args.cldice_weight else logits.new_zeros(()),
    ]
    return torch.stack(parts)


def log(run: Run, weights: Tensor, speed: dict[str, float]) -> str:
    """Write the scalars since the last log; returns the main ones as a line."""
    progress = run.progress
    means = (progress.loss_sums / progress.samples).tolist()
    scalars = {
        "train/loss": float(np.dot(means, weights.tolist())),
        "train/focal": means[0],
        "train/dice": means[1],
        "train/iou_mse": means[2],
        **({"train/cldice": means[3]} if weights[3] else {}),
        "train/lr": run.optimizer.param_groups[0]["lr"],
        "train/bad_steps": progress.bad_steps,
        **speed,
    }
    if progress.loss_sums.device.type == "cuda":
        scalars["train/gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if run.writer:
        for name, value in scalars.items():
            run.writer.add_scalar(name, value, progress.iteration)
    return (
        f"loss {scalars['train/loss']:.3f}, lr {scalars['train/lr']:.1e}, "
        f"{speed['train/images_per_s']:.2f} images/s, {speed['train/data_wait']:.0%} data wait"
    )


def test(args: argparse.Namespace, setup: Setup, run: Run) -> dict[str, float]:
    """Evaluate on the test set and log it; returns the iteration and all measures."""
    iteration = run.progress.iteration
    measured, panels = evaluate(setup, run.tests, args.batch_size)
    everywhere = runtime.gather(measured)
    summary = aggregate(everywhere)
    result = {"iteration": iteration} | summary
    if run.writer:
        for name, value in summary.items():
            run.writer.add_scalar(f"test/{name}", value, iteration)
        log_precision_and_recall(run.writer, everywhere, iteration)
        ranked = sorted(range(len(measured)), key=lambda index: measured[index].scores.iou)
        chosen = [panels[ranked[0]], panels[ranked[len(ranked) // 2]]]
        pictures = {"test/panel": panels[:PANELS], "test/worst_and_median": chosen}
        for name, shown in pictures.items():
            run.writer.add_image(name, sheet(shown), iteration, dataformats="HWC")
        with (setup.folder / METRICS_FILE).open("a") as file:
            file.write(json.dumps(result) + "\n")
        tqdm.write(f"iteration {iteration}: test IoU {summary['iou']:.4f}, Dice {summary['dice']:.4f}")
    return result


BEST = ("iou", "dice", "cldice")  # measures of the best test in TensorBoard's table of runs


def log_settings(writer: SummaryWriter, args: argparse.Namespace, iteration: int) -> None:
    """The flags as text, and as this run's row in TensorBoard's table of runs (HPARAMS)."""
    flags = settings(args)
    writer.add_text("flags", f"```\n{yaml.safe_dump(flags, sort_keys=False)}```", iteration)
    left_out = {*MAY_CHANGE, "exp_name", "checkpoint"} - {"config", "epoch_num"}
    columns = {name: flags[name] for name in flags if name not in left_out and flags[name] is not None}
    for part in hparams(columns, {f"best/{name}": 0.0 for name in BEST})[:2]:  # the third says: ended
        writer.file_writer.add_summary(part)


def log_best(run: Run) -> None:
    if run.writer:
        for name in BEST:
            run.writer.add_scalar(f"best/{name}", run.progress.best[name], run.progress.iteration)


def log_precision_and_recall(writer: SummaryWriter, measured: list[ImageStats], iteration: int) -> None:
    """Precision over recall of all pixels together, at THRESHOLDS of the logits."""
    false, true = sum(m.counts for m in measured)
    background, foreground = sum(m.pixel_counts for m in measured)
    precision, recall = true / np.maximum(true + false, 1), true / max(foreground, 1)
    counts = (true, false, background - false, foreground - true)
    writer.add_pr_curve_raw("test/pixels", *counts, precision, recall, iteration, num_thresholds=len(true))


def save_weights(setup: Setup, name: str) -> None:
    if runtime.is_main():
        weights = trainable.export_state_dict(setup.sam, setup.loaded)
        checkpoint.save_weights(weights, setup.checkpoints / name)


def next_batch(batches: Iterator[tuple]) -> tuple:
    """The next of `embedded_batches`; raises StopIteration at the end, RunError if data fails."""
    try:
        return next(batches)
    except UnreadableFile as error:
        raise RunError(str(error)) from error
    except RuntimeError as error:
        raise as_run_error(error) from error


def as_run_error(error: RuntimeError) -> Exception:
    """RunError if it says that a data worker died, which PyTorch may say at any moment; else the error."""
    if "DataLoader worker" not in str(error):
        return error
    return RunError(f"a process that prepares data has died, for want of memory perhaps: {error}")


def bad_steps_message(progress: Progress, setup: Setup, uses: list[Use]) -> str:
    """Why a run ends whose losses or gradients are not finite."""
    sources = setup.train_set.sources
    names = sorted({str(sources[use.source].pairs[use.pair].image_path) for use in uses})
    best = setup.checkpoints / "best.pth"
    return (
        f"iteration {progress.iteration}: loss or gradient was not finite in {progress.bad_in_row} steps "
        f"in a row (--max_bad_steps); the last batch held {', '.join(names)}; last good weights: "
        f"{best if progress.best else 'none were saved'}; a lower --lr may help"
    )


def remove_old(checkpoints: Path, keep: int | None) -> None:
    """Remove the epochs' checkpoints but for the last `keep`."""
    if keep and runtime.is_main():
        for path in sorted(checkpoints.glob("epoch_*.pth"))[:-keep]:
            path.unlink()


def save_state(args: argparse.Namespace, setup: Setup, run: Run) -> None:
    """Save what `--resume` needs: no generator's state, for samples are functions of seed, epoch and slot."""
    amid_step = run.schedule.is_amid_step(run.progress.iteration)
    gradients = trainable.gradients(setup.sam) if amid_step else {}
    runtime.all_reduce_sum(gradients.values())
    if not run.writer:
        return
    run.writer.flush()
    state = {
        "progress": vars(run.progress),
        "weights": trainable.trained_weights(setup.sam),
        "gradients": gradients,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "flags": settings(args),
        "processes": runtime.world_size(),
        "config": setup.config.model_dump_json(),
        "files": file_digests(setup.sources),
    }
    checkpoint.save_resume_state(state, setup.folder / RESUME_FILE)


def load_state(setup: Setup, run: Run) -> None:
    """Set what `save_state` saved."""
    state = setup.resume
    trainable.load_trained_weights(setup.sam, state["weights"])
    if runtime.is_main():  # those of all processes are in it
        trainable.load_gradients(setup.sam, state["gradients"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.progress = Progress(**state["progress"])
    run.progress.loss_sums = run.progress.loss_sums.to(setup.device)
    drop_later_lines(setup.folder / METRICS_FILE, run.progress.iteration)


def drop_later_lines(path: Path, iteration: int) -> None:
    """Of the measures written so far keep those up to an iteration: the rest is measured again."""
    if runtime.is_main() and path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]  # whole ones
        kept = [line for line in lines if json.loads(line)["iteration"] <= iteration]
        text = "".join(f"{line}\n" for line in kept)
        atomic.write_atomically(path, lambda file: file.write(text.encode()))


def settings(args: argparse.Namespace) -> dict:
    """The flags as plain values that YAML can hold."""
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    del flags["resume"], flags["preview"]
    return flags


def write_settings(args: argparse.Namespace, setup: Setup) -> None:
    """Write `config.yaml` (folders resolved) and `args.yaml` as this run uses them."""
    config = json.loads(setup.config.model_dump_json())
    for name, values in (("config.yaml", config), ("args.yaml", settings(args))):
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        atomic.write_atomically(setup.folder / name, lambda file, text=text: file.write(text.encode()))


def print_result(progress: Progress, checkpoints: Path) -> None:
    """The closing lines of a run: baseline against tuned, and where things lie."""
    if progress.baseline and progress.best:
        baseline, best = progress.baseline, progress.best
        print(
            f"baseline -> tuned: IoU {baseline['iou']:.4f} -> {best['iou']:.4f}, "
            f"Dice {baseline['dice']:.4f} -> {best['dice']:.4f} (best at iteration {best['iteration']})"
        )
        print(f"best weights     {checkpoints / 'best.pth'}")
    if (checkpoints / "last.pth").exists():
        print(f"last weights     {checkpoints / 'last.pth'}")
    print(f"curves           tensorboard --logdir {checkpoints.parent}")


if __name__ == "__main__":
    sys.exit(main())
