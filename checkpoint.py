"""Write files whole or not at all, and read checkpoints without running what is in them."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a file that takes the name `path` only once it is safely on disk.

    Whatever goes wrong, `path` holds its old content or the new, never a part. Raises OSError naming it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # of torch.save the latter
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} could not be written, and is as it was: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened to sync the rename itself
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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

    Raises FileNotFoundError, or ValueError naming the file if it is truncated, holds what could run
    code, or is no mapping of names to tensors.
    """
    state_dict = _load(path)
    is_plain = isinstance(state_dict, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state_dict.items()
    )
    if not is_plain:
        raise ValueError(f"{path} is not a plain state_dict (weight names mapped to tensors)")
    return state_dict


def _load(path: Path) -> Any:
    """What is in a file of `torch.save`, with `weights_only=True`: code in it is never run."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint not found: {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is damaged or holds more than weights, and could run code when "
            f"loaded ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint; is it cut off? ({error})") from error
