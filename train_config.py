"""The flags of finetune.py, resolved into a frozen `TrainConfig`."""

import argparse
import os
import re
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import runtime
from base.flag_types import count, decay, fraction, not_negative, positive, positive_int
from checkpoint import MAY_CHANGE_ON_RESUME
from imaging.files import MAX_PIXELS
from imaging.prompts import PROMPT_KINDS
from sam.variants import VARIANTS


def folder_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.+=@ -]*", text):
        raise argparse.ArgumentTypeError(
            f"expected the name of a folder inside exp/, without separators, got {text!r}"
        )
    return text


def default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // runtime.local_world_size() - 1))


# --- Flags ------------------------------------------------------------------------------------

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "bf16", "fp16", "off")
TRAIN = ("decoder", "lora", "encoder")
RESUME_HELP = f"continue exp/EXP_NAME; flags that may change: {', '.join(MAY_CHANGE_ON_RESUME)}"


def flag(default: Any, parse: Any, help: str, *, short: str = "", metavar: str | None = None) -> Any:
    """A field that is a flag. `parse` is an argparse type, a collection of choices, or bool for a switch."""
    return field(default=default, metadata={"parse": parse, "help": help, "short": short, "metavar": metavar})


@dataclass(frozen=True)
class TrainConfig:
    """Every flag. No default is left that depends on another flag; "auto" is resolved on the device.

    `test_interval` is None until `experiment.prepare` knows the number of iterations.
    """

    # fmt: off
    # run
    config: Path = flag(MISSING, Path, "YAML file that describes the data", short="-c")
    exp_name: str = flag(None, folder_name, "results go to exp/EXP_NAME (default: CONFIG_TIME)", short="-n")
    preview: bool = flag(False, bool, "only check the data, and show it in exp/EXP_NAME/preview/")
    seed: int = flag(0, count, "seed of every random choice")
    max_pixels: int = flag(MAX_PIXELS, positive_int, "most pixels of an image; larger ones are refused")
    test_interval: int = flag(None, positive_int, "iterations (batches) between tests (default: 1/8 of all)")
    log_interval: int = flag(10, positive_int, "iterations between logged scalars")
    # saving
    resume: bool = flag(False, bool, RESUME_HELP)
    resume_interval: float = flag(10.0, positive, "minutes between saved states", metavar="MINUTES")
    save_interval: int = flag(10, positive_int, "epochs between checkpoints", short="-s")
    keep_last: int | None = flag(None, positive_int, "newest epoch checkpoints to keep (default: all)")
    # speed
    device: str = flag("auto", DEVICES, "where to compute; auto: the first available")
    amp: str = flag("auto", PRECISIONS, "mixed precision; auto: what the hardware computes fast")
    compile: str = flag("auto", ("auto", "on", "off"), "torch.compile; auto: for long runs on CUDA")
    embedding_reuse: int = flag(1, positive_int, "epochs that use each composite's embedding", metavar="R")
    num_workers: int = flag(default_workers(), count, "processes that prepare data; 0: the main process")
    cache_mb: int = flag(2048, count, "MiB of memory for decoded files, shared by the data workers")
    # model
    model_type: str = flag("vit_b", VARIANTS, "SAM variant")
    checkpoint: Path | None = flag(None, Path, "weights to start from (default: the published weights)")
    train: str = flag("decoder", TRAIN, "the mask decoder; also adapters in the encoder; also all of it")
    lora_rank: int = flag(8, positive_int, "rank of the adapters")
    lora_alpha: float = flag(16.0, positive, "the adapters' output is multiplied by alpha / rank")
    grad_checkpointing: bool = flag(False, bool, "less memory for a training encoder, more computation")
    prompt: str = flag("none", PROMPT_KINDS, "prompt of each sample; mixed: none, point or box at random")
    # optimization
    epoch_num: int = flag(50, positive_int, "number of epochs", short="-e")
    batch_size: int = flag(None, positive_int, "samples per batch (default: 4; encoder, lora: 1)", short="-b")
    virtual_batch_size: int = flag(1, positive_int, "batches per optimizer step (gradient accumulation)")
    lr: float = flag(None, positive, "peak learning rate (default: 1e-3; if the encoder trains 5e-4)")
    encoder_lr: float = flag(None, positive, "the encoder's peak rate (default: lr / 2; lora: 2 x lr)")
    layer_decay: float = flag(0.9, decay, "--train encoder: each block has this times the next one's rate")
    warmup_steps: int = flag(10, count, "optimizer steps of linear warm-up")
    lr_power: float = flag(1.0, not_negative, "power of the decay after warm-up; 0: constant rate")
    weight_decay: float = flag(0.01, not_negative, "weight decay of AdamW")
    grad_clip: float = flag(1.0, positive, "largest norm of the gradient")
    max_bad_steps: int = flag(10, positive_int, "non-finite steps in a row that end the run")
    # loss
    alpha: float = flag(None, fraction, "focal loss: weight of foreground (default: 0.7; lora, encoder: 0.5)")
    gamma: float = flag(2.0, not_negative, "focal loss: focusing power")
    focal_weight: float = flag(20.0, not_negative, "weight of the focal loss")
    dice_weight: float = flag(1.0, not_negative, "weight of the Dice loss")
    iou_weight: float = flag(1.0, not_negative, "weight of the squared error of the predicted IoU")
    cldice_weight: float = flag(0.0, not_negative, "weight of the clDice loss, for cables without gaps")
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
# Defaults that depend on --train: with a frozen encoder, and with one that trains.
DEFAULTS_BY_TRAIN = {"lr": (1e-3, 5e-4), "batch_size": (4, 1), "alpha": (0.7, 0.5)}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fine-tune SAM to segment cables.")
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
        return {"type": parse, "required": True, "help": text}
    if f.default is not None:
        text += " (default: %(default)s)"
    values = {"type": parse} if callable(parse) else {"choices": list(parse)}
    return {"default": f.default, "help": text, "metavar": metavar} | values


def parse_args(argv: list[str] | None = None) -> TrainConfig:
    """The command line, with every default resolved. Exits with code 2 after a message for a wrong flag."""
    parser = build_parser()
    flags = vars(parser.parse_args(argv))
    for name, (if_frozen, if_trained) in DEFAULTS_BY_TRAIN.items():
        if flags[name] is None:
            flags[name] = if_frozen if flags["train"] == "decoder" else if_trained
    if flags["encoder_lr"] is None:
        flags["encoder_lr"] = flags["lr"] * (2 if flags["train"] == "lora" else 0.5)
    if flags["embedding_reuse"] > 1 and flags["train"] != "decoder":
        parser.error(f"--embedding_reuse above 1 needs a frozen encoder, but --train is {flags['train']}")
    if flags["resume"] and flags["exp_name"] is None:
        parser.error("--resume needs the --exp_name of the run that it continues")
    if flags["exp_name"] is None:
        flags["exp_name"] = f"{flags['config'].stem}_{datetime.now():%Y%m%d-%H%M%S}"
    return TrainConfig(**flags)
