"""The sidecar of a checkpoint: `best.json` describes `best.pth`. Nothing requires it."""

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from base.atomic import write_text
from imaging.metrics import GroundTruth


class Sidecar(BaseModel):
    """The content of the file. Missing keys have their defaults; unknown keys are ignored.

    model_type, input_size: the SAM variant, and the side of its square input in pixels.
    train, prompt: the flags `--train` and `--prompt` of the training.
    iteration: how many iterations the weights were trained.
    threshold: a pixel is cable if its logit is above it; see `imaging.metrics.robust_threshold`.
    cable_width: median width of the cables in training, in pixels of the model's input; None if unknown.
    metrics: those of the last test before the weights were saved, with its iteration; empty without a test.
    flags: all flags of the training.
    data: for "train" a list, for "test" one or None: folder, number of pairs and of backgrounds, and keys.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, protected_namespaces=())

    model_type: str
    input_size: int
    train: str | None = None
    prompt: str | None = None
    iteration: int | None = None
    threshold: float = 0.0
    cable_width: Annotated[float, Field(gt=0)] | None = None
    metrics: Mapping[str, float | None] = {}
    flags: dict[str, Any] = {}
    data: dict[str, Any] = {}


def sidecar_path(checkpoint_path: Path) -> Path:
    """The sidecar of a checkpoint: the same name with the suffix .json; of a folder, sidecar.json in it."""
    if os.path.isdir(checkpoint_path):
        return checkpoint_path / "sidecar.json"
    return checkpoint_path.with_suffix(".json")


def write_sidecar(sidecar: Sidecar, checkpoint_path: Path) -> None:
    """Write the sidecar of a checkpoint, whole or not at all. Raises UserError."""
    write_text(sidecar_path(checkpoint_path), sidecar.model_dump_json(indent=2) + "\n")


def read_sidecar(checkpoint_path: Path, model_type: str) -> Sidecar | None:
    """The sidecar of a checkpoint; None without one. Warns of one that cannot be used, and returns None.

    model_type: what the weights are. A sidecar of another model type belongs to other weights.
    """
    path = sidecar_path(checkpoint_path)
    try:
        sidecar = Sidecar.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn_of_ignored(path, f"it cannot be read ({error.strerror})")
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        _warn_of_ignored(path, f"it is damaged ({f'{key}: ' * bool(key)}{first['msg']})")
        return None
    if sidecar.model_type != model_type:
        _warn_of_ignored(path, f"it describes {sidecar.model_type}, but the weights are {model_type}")
        return None
    return sidecar


def _warn_of_ignored(path: Path, reason: str) -> None:
    warnings.warn(f"{path} is ignored: {reason}. The defaults are used instead.", stacklevel=4)


def median_cable_width(masks: Iterable[np.ndarray]) -> float | None:
    """Median width in pixels over all centerline pixels of bool masks (H, W); None if all are empty.

    The width at a centerline pixel is twice its distance to the background, less one pixel.
    """
    widths = [GroundTruth.from_mask(mask).widths for mask in masks]
    all_widths = np.concatenate(widths) if widths else np.zeros(0)
    return float(np.median(all_widths)) if len(all_widths) else None
