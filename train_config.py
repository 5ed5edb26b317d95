"""The flags of finetune.py, resolved into a frozen `TrainConfig`."""

import argparse
import os
import re
import sys
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

# Nothing here imports PyTorch, so that `--help` is quick.
from base.flag_types import (
    MAX_PIXELS,
    count,
    decay,
    fraction,
    not_negative,
    number,
    path,
    percentage,
    positive,
    positive_int,
)
from imaging.prompts import PROMPT_KINDS


def folder_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.+=@ -]*", text):
        raise argparse.ArgumentTypeError(
            f"expected the name of a folder inside exp/, without separators, got {text!r}"
        )
    return text


def default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun on this machine
    return max(1, min(16, cores // processes - 1))


seed_number = number(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")
rate = number(float, lambda value: 0 < value <= 1000, "a number above 0, at most 1000")
AUTO = 0  # `batch_size` for "auto", until `experiment.prepare` has found a number


def size_or_auto(text: str) -> int:
    return AUTO if text == "auto" else positive_int(text)


# --- Flags ------------------------------------------------------------------------------------

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "bf16", "fp16", "off")
TRAIN = ("decoder", "lora", "encoder")
TRAIN_HELP = (
    "decoder: the mask decoder; lora: also adapters in the encoder; encoder: also the whole encoder "
    "(default: decoder; without CUDA, encoder for lite_medsam and lite_medsam_512)"
)
# The keys of sam.variants.VARIANTS.
MODEL_TYPES = ["vit_b", "vit_l", "vit_h", "lite_medsam", "lite_medsam_512", "mobile_sam"]

# Flags that may differ when a run is resumed. They do not change the samples. Another `epoch_num` changes the
# learning rates of the remaining steps. Another `device` must compute in the same precision. The files under
# other paths of `config` and `checkpoint` must have the same content.
MAY_CHANGE_ON_RESUME = (
    "config",
    "checkpoint",
    "epoch_num",
    "device",
    "num_workers",
    "cache_mb",
    "grad_checkpointing",
    "save_interval",
    "keep_last",
    "resume_interval",
    "max_bad_steps",
    "max_pixels",
    "test_interval",
    "patience",
    "log_interval",
)
RESUME_HELP = f"continue exp/EXP_NAME; flags that may change: {', '.join(MAY_CHANGE_ON_RESUME)}"
CONFIG_HELP = "YAML file that describes the data; required, but not with --resume"
PIXELS_HELP = "largest number of pixels of an image; larger images are refused"
PATIENCE_HELP = "end the run after this many tests in a row without a better IoU (default: off)"
REUSE_HELP = "use every composite in R epochs, and encode it once; needs --train decoder"
BATCH_HELP = "samples per batch, or auto (default: 4; lora, encoder: 1)"
LAYER_HELP = "--train encoder: factor on the rate for every block further from the output"
# The flags and the data of a run, in exp/NAME.
ARGS_FILE, CONFIG_FILE = "args.yaml", "config.yaml"


def flag(default: Any, parse: Any, help: str, *, short: str = "", metavar: str | None = None) -> Any:
    """A field that is a flag. `parse` is an argparse type, a collection of choices, or bool for a switch."""
    return field(default=default, metadata={"parse": parse, "help": help, "short": short, "metavar": metavar})


@dataclass(frozen=True)
class TrainConfig:
    """Every flag. No default depends on another flag any more; "auto" is resolved later, on the device.

    `test_interval` is None until `experiment.prepare` knows the number of iterations, and `batch_size` may
    be AUTO until it knows the device.
    """

    # fmt: off
    # run
    config: Path = flag(MISSING, path, CONFIG_HELP, short="-c")
    exp_name: str = flag(None, folder_name, "results go to exp/EXP_NAME (default: CONFIG_TIME)", short="-n")
    preview: bool = flag(False, bool, "only check the data, and draw samples in exp/EXP_NAME/preview/")
    seed: int = flag(0, seed_number, "seed of every random choice")
    max_pixels: int = flag(MAX_PIXELS, positive_int, PIXELS_HELP)
    test_interval: int = flag(None, positive_int, "iterations between tests (default: 1/8 of the run)")
    patience: int | None = flag(None, positive_int, PATIENCE_HELP)
    val_percentage: float = flag(0.0, percentage, "percent of the pairs to test on, if no test set is given")
    log_interval: int = flag(10, positive_int, "iterations between logged scalars")
    # saving
    resume: bool = flag(False, bool, RESUME_HELP)
    resume_interval: float = flag(10.0, positive, "minutes between saved states", metavar="MINUTES")
    save_interval: int = flag(10, positive_int, "epochs between checkpoints", short="-s")
    keep_last: int | None = flag(None, positive_int, "how many epoch checkpoints to keep (default: all)")
    # speed
    device: str = flag("auto", DEVICES, "auto: the first available of cuda, mps, cpu")
    amp: str = flag("auto", PRECISIONS, "mixed precision; auto: what the hardware computes fast")
    compile: str = flag("auto", ("auto", "on", "off"), "torch.compile; auto: for long runs on CUDA")
    embedding_reuse: int = flag(1, positive_int, REUSE_HELP, metavar="R")
    num_workers: int = flag(default_workers(), count, "processes that prepare data; 0: the main process")
    cache_mb: int = flag(2048, count, "MiB of memory for decoded files, shared by the data workers")
    # model
    model_type: str = flag(None, MODEL_TYPES, "SAM variant (default: vit_b; without CUDA: lite_medsam_512)")
    checkpoint: Path | None = flag(None, path, "weights to start from (default: the published weights)")
    train: str = flag(None, TRAIN, TRAIN_HELP)
    lora_rank: int = flag(8, positive_int, "rank of the adapters")
    lora_alpha: float = flag(16.0, positive, "the adapters' output is multiplied by alpha / rank")
    grad_checkpointing: bool = flag(False, bool, "less memory but more computation if the encoder trains")
    prompt: str = flag("none", PROMPT_KINDS, "prompt of each sample; mixed: none, point or box at random")
    # optimization
    epoch_num: int = flag(50, positive_int, "number of epochs", short="-e")
    minutes: float | None = flag(None, positive, "duration, instead of --epoch_num (default: off)")
    batch_size: int = flag(None, size_or_auto, BATCH_HELP, short="-b")
    virtual_batch_size: int = flag(1, positive_int, "batches per optimizer step (gradient accumulation)")
    lr: float = flag(None, rate, "peak learning rate (default: 1e-3; lora, encoder: 5e-4)")
    encoder_lr: float = flag(None, rate, "peak rate of the encoder (default: lr / 2; lora: 2 x lr)")
    layer_decay: float = flag(0.9, decay, LAYER_HELP)
    warmup_steps: int = flag(10, count, "optimizer steps of linear warm-up")
    lr_power: float = flag(1.0, not_negative, "power of the decay after warm-up; 0: constant rate")
    weight_decay: float = flag(0.01, not_negative, "weight decay of AdamW")
    grad_clip: float = flag(1.0, positive, "largest norm of the gradient")
    max_bad_steps: int = flag(10, positive_int, "end after this many non-finite steps in a row")
    # loss
    alpha: float = flag(None, fraction, "focal loss: weight of foreground (default: 0.7; lora, encoder: 0.5)")
    gamma: float = flag(2.0, not_negative, "focal loss: focusing power")
    focal_weight: float = flag(20.0, not_negative, "weight of the focal loss")
    dice_weight: float = flag(1.0, not_negative, "weight of the Dice loss")
    iou_weight: float = flag(1.0, not_negative, "weight of the squared error of the predicted IoU")
    cldice_weight: float = flag(0.0, not_negative, "weight of the clDice loss, which penalizes gaps")
    # fmt: on

    @property
    def folder(self) -> Path:
        return Path("exp") / self.exp_name

    @property
    def loss_weights(self) -> dict[str, float]:
        weights = {"focal": self.focal_weight, "dice": self.dice_weight, "iou_mse": self.iou_weight}
        return weights | ({"cldice": self.cldice_weight} if self.cldice_weight else {})

    def flags(self) -> dict[str, Any]:
        """The flags that describe the training, as plain values that YAML can hold."""
        values = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()}
        del values["resume"], values["preview"]
        return values


# First flag of each group in `--help`.
GROUPS = {
    "config": "run",
    "resume": "saving",
    "device": "speed",
    "model_type": "model",
    "epoch_num": "optimization",
    "alpha": "loss",
}
# Defaults that depend on --train, which `choose_by_machine` has resolved: with a frozen encoder, and with one
# that trains.
DEFAULTS_BY_TRAIN = {"lr": (1e-3, 5e-4), "batch_size": (4, 1), "alpha": (0.7, 0.5)}


def default_batch_size(train: str) -> int:
    if_frozen, if_trained = DEFAULTS_BY_TRAIN["batch_size"]
    return int(if_frozen if train == "decoder" else if_trained)


def build_parser() -> argparse.ArgumentParser:
    usage = (
        "%(prog)s --config FILE [--exp_name NAME] [flags]\n       %(prog)s --exp_name NAME --resume [flags]"
    )
    parser = argparse.ArgumentParser(usage=usage, description="Fine-tune SAM to segment cables.")
    group: argparse._ArgumentGroup | argparse.ArgumentParser = parser
    for f in fields(TrainConfig):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        names = [f"--{f.name}", *([f.metadata["short"]] if f.metadata["short"] else [])]
        group.add_argument(*names, **_argument(f))
    return parser


def _argument(f: Field[Any]) -> dict[str, Any]:
    """What argparse takes for one flag."""
    parse, text, metavar = f.metadata["parse"], f.metadata["help"], f.metadata["metavar"]
    if parse is bool:
        return {"action": "store_true", "help": text}
    if f.default is MISSING:
        return {"type": parse, "help": text}  # `parse_args` requires it, unless a resumed run has it
    if f.default is not None:
        text += " (default: %(default)s)"
    values = {"type": parse} if callable(parse) else {"choices": list(parse)}
    return {"default": f.default, "help": text, "metavar": metavar} | values


def read_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line as it is given. Exits with code 2 after a message for a wrong flag.

    With --resume, the flags and the YAML file of the run in exp/EXP_NAME come first.
    """
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    stored = _flags_of_resumed_run(parser, argv)
    flags = parser.parse_args([*stored, *argv])
    if flags.config is None:
        run = f"; exp/{flags.exp_name} holds no {ARGS_FILE}" if flags.resume else ""
        parser.error(f"the following arguments are required: --config/-c{run}")
    if stored and flags.batch_size == AUTO:  # the numbers that were found when the run started
        found = parser.parse_args(stored)
        flags.batch_size, flags.virtual_batch_size = found.batch_size, found.virtual_batch_size
    if flags.embedding_reuse > 1 and flags.train not in (None, "decoder"):
        parser.error(f"--embedding_reuse above 1 needs a frozen encoder, but --train is {flags.train}")
    losses = ("--focal_weight", "--dice_weight", "--iou_weight", "--cldice_weight")
    if not any(getattr(flags, name[2:]) for name in losses):
        parser.error(f"{', '.join(losses)} are all 0, so nothing would train: expected one above 0")
    return flags


def parse_args(argv: list[str] | None = None, *, quiet: bool = False) -> TrainConfig:
    """The flags of `read_flags`, with every default resolved.

    Prints which model and training were chosen for this machine, unless they are given or `quiet`.
    """
    flags = vars(read_flags(argv))
    chosen = choose_by_machine(flags)
    if chosen and not quiet and os.environ.get("RANK", "0") == "0":
        print(chosen)
    for name, (if_frozen, if_trained) in DEFAULTS_BY_TRAIN.items():
        if flags[name] is None:
            flags[name] = if_frozen if flags["train"] == "decoder" else if_trained
    if flags["encoder_lr"] is None:
        flags["encoder_lr"] = flags["lr"] * (2 if flags["train"] == "lora" else 0.5)
    if flags["exp_name"] is None:
        flags["exp_name"] = f"{flags['config'].stem}_{datetime.now():%Y%m%d-%H%M%S}"
    return TrainConfig(**flags)


def choose_by_machine(flags: dict[str, Any]) -> str:
    """Set `model_type` and `train` where they are None; returns a line that says what was chosen and why.

    With CUDA, they are vit_b and decoder. Without, they are lite_medsam_512 and encoder, which train in about
    an hour on a CPU; the decoder is chosen for other models, and if embeddings are reused. The line is "" if
    both were given.
    """
    names = [name for name in ("model_type", "train") if flags[name] is None]
    if not names:
        return ""
    import torch  # as late as here, because it takes seconds

    has_cuda = flags["device"] == "cuda" or (flags["device"] == "auto" and torch.cuda.is_available())
    reasons = ["it runs on CUDA" if has_cuda else "it does not run on CUDA"]
    if flags["model_type"] is None:
        flags["model_type"] = "vit_b" if has_cuda else "lite_medsam_512"
    if flags["train"] is None:
        if flags["embedding_reuse"] > 1:
            reasons.append("--embedding_reuse needs a frozen encoder")
        elif flags["model_type"] not in ("lite_medsam", "lite_medsam_512") and not has_cuda:
            reasons.append(f"the encoder of {flags['model_type']} would train slowly")
        flags["train"] = "decoder" if has_cuda or len(reasons) > 1 else "encoder"
    chosen = " ".join(f"--{name} {flags[name]}" for name in names)
    return f"chosen for this run: {chosen} ({'; '.join(reasons)})"


def _flags_of_resumed_run(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """The flags that a run was started with, as a command line; empty without --resume."""
    resume_parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    resume_parser.add_argument("--resume", action="store_true")
    resume_parser.add_argument("--exp_name", "-n", type=folder_name)
    try:
        flags, _ = resume_parser.parse_known_args(argv)
    except argparse.ArgumentError:  # `parser` says which
        return []
    if not flags.resume:
        return []
    if flags.exp_name is None:
        parser.error("--resume needs the --exp_name of the run that it continues")
    folder = Path("exp") / flags.exp_name
    if not os.path.isdir(folder):  # Path.is_dir raises OSError for a name that is too long
        parser.error(f"{folder}: there is no such run to resume (--exp_name, --resume)")
    path = folder / ARGS_FILE
    if not os.path.exists(path):  # the run died early: it starts again with the flags that are given
        return []
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"{path}: cannot be read ({error}); expected the flags of the run")
    if not isinstance(stored, dict):
        parser.error(f"{path}: expected the flags of the run, one in each line")
    if (folder / CONFIG_FILE).exists():
        stored["config"] = folder / CONFIG_FILE
    names = {f.name for f in fields(TrainConfig)} - {"exp_name"}
    shown = {name: value for name, value in stored.items() if name in names and value not in (None, "")}
    return [f"--{name}={value}" for name, value in shown.items() if not isinstance(value, bool)] + [
        f"--{name}" for name, value in shown.items() if value is True
    ]
