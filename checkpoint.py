"""Write files whole or not at all, and read checkpoints without running what is in them."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.atomic import write_atomically
from base.errors import UserError


def save_weights(state_dict: dict[str, Tensor], path: Path) -> None:
    """Save a plain `state_dict`, on the CPU, as segment_anything's builders read it."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    write_atomically(path, lambda file: torch.save(on_cpu, file))


def save_resume_state(state: dict, path: Path) -> None:
    """Save what a run needs to go on: nested dicts and lists of tensors, numbers and strings."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_resume_state(path: Path) -> dict:
    """Read what `save_resume_state` wrote; raises as `load_weights` does."""
    return _load(path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a plain `state_dict`.

    Raises UserError naming the file if it is truncated, holds what could run
    code, or is no mapping of names to tensors.
    """
    state_dict = _load(path)
    is_plain = isinstance(state_dict, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state_dict.items()
    )
    if not is_plain:
        raise UserError(f"{path} is not a plain state_dict (weight names mapped to tensors)")
    return state_dict


def _load(path: Path) -> Any:
    """What is in a file of `torch.save`, with `weights_only=True`: code in it is never run."""
    if not path.is_file():
        raise UserError(f"checkpoint not found: {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is damaged or holds more than weights, and could run code when "
            f"loaded ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a checkpoint; is it cut off? ({error})") from error
