"""Checkpoints: strict and safe loads, saved weights, and the state from which a run resumes.

Loads never run code from a file (`weights_only=True`). Writes are atomic.
"""

import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from base.atomic import write_atomically
from base.errors import UserError
from imaging.files import format_list

RESUME_FILE = "resume.pth"  # in exp/NAME
LOCK_FILE = ".lock"  # in exp/NAME while a run is under way

# --- Weights ----------------------------------------------------------------------------------


def save_weights(state_dict: dict[str, Tensor], path: Path) -> None:
    """Save a plain `state_dict`, on the CPU, as segment_anything's builders read it."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    write_atomically(path, lambda file: torch.save(on_cpu, file))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a plain `state_dict`.

    Raises UserError, which names the file, if it is missing, truncated, holds anything that could run code,
    or is no mapping of names to tensors.
    """
    state_dict = _load(path)
    is_plain = isinstance(state_dict, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state_dict.items()
    )
    if not is_plain:
        raise UserError(f"{path} is not a plain state_dict (weight names mapped to tensors)")
    return state_dict


def file_digest(path: Path) -> str:
    """Hash of the bytes of a file."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return digest.hexdigest()


def _load(path: Path) -> Any:
    """What `torch.save` wrote to a file; code in it is never run."""
    if not os.path.isfile(path):  # False also for a path that cannot be asked for
        raise UserError(f"checkpoint not found: {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is damaged, or it holds more than weights and could run code when loaded "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a checkpoint; is it truncated? ({error})") from error


# --- Resuming ---------------------------------------------------------------------------------

# Flags that may differ when a run is resumed. They do not change the samples. Another `epoch_num` changes the
# learning rates of the remaining steps. Another `device` must compute in the same precision.
MAY_CHANGE_ON_RESUME = (
    "config",
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
    "log_interval",
)


# The value of `--amp` that asks for a precision.
AMP_CHOICES = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}


class ResumeState(TypedDict):
    """What a run needs to continue, beside the weights it started from.

    train_state: `TrainState.state_dict()`.
    weights: everything that trains, by name.
    gradients: the sum so far of an unfinished optimizer step, by name; else empty.
    flags, config, files: what the run was started with: flags by name, the data's config as JSON, and pixel
        hashes of the files by path.
    initial_weights, precision, world_size: hash of the weights file, dtype of mixed precision, and number of
        processes.

    There is no state of a random generator: samples are functions of seed, epoch and index.
    """

    train_state: dict[str, Any]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    flags: dict[str, Any]
    config: str
    files: dict[str, str]
    initial_weights: str
    precision: str
    world_size: int


def save_resume_state(state: ResumeState, path: Path) -> None:
    """Save it: nested dicts and lists of tensors, numbers and strings."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_resume_state(path: Path) -> ResumeState:
    """Read what `save_resume_state` wrote. Raises UserError as `load_weights` does."""
    state = _load(path)
    if not isinstance(state, dict) or state.keys() != ResumeState.__required_keys__:
        raise UserError(f"{path} is not a state that this version saved; start the run again")
    return state  # type: ignore[return-value]  # its keys are checked


def check_same_settings(
    state: ResumeState, *, flags: dict[str, Any], config: str, world_size: int, folder: Path
) -> None:
    """Raise UserError, with both values, for every flag or data setting that may not change on resume."""
    faults = [
        f"--{name}: was {state['flags'].get(name)}, is now {value}"
        for name, value in flags.items()
        if name not in MAY_CHANGE_ON_RESUME and state["flags"].get(name) != value
    ]
    if state["world_size"] != world_size:
        faults.append(f"processes: were {state['world_size']}, are now {world_size}")
    if state["config"] != config:
        faults.append(f"the data: was {state['config']}, is now {config}")
    if faults:
        raise UserError("\n  ".join([f"{folder} cannot be resumed with other settings:", *faults]))


def check_same_weights(
    state: ResumeState, *, initial_weights: str, precision: str, trained: dict[str, Tensor], path: Path
) -> None:
    """Raise UserError if the run would continue on other weights, in another precision, or another model.

    initial_weights, path: hash and path of the weights file. trained: what trains now, by name.
    """
    if state["initial_weights"] != initial_weights:
        raise UserError(
            f"{path} is not the weights file that the run started from; give that file with --checkpoint"
        )
    if state["precision"] != precision:
        raise UserError(
            f"the run computed in {state['precision']}, this machine would in {precision}: add "
            f"--amp {AMP_CHOICES.get(state['precision'], 'off')}"
        )
    shapes = {name: weight.shape for name, weight in trained.items()}
    if {name: weight.shape for name, weight in state["weights"].items()} != shapes:
        raise UserError("the saved state is not of this model; start the run again with another --exp_name")


def check_same_files(state: ResumeState, digests: dict[str, str], folder: Path) -> None:
    """Raise UserError that names the files which were added, removed or changed."""
    before = state["files"]
    changed = sorted(path for path in before.keys() | digests.keys() if before.get(path) != digests.get(path))
    if changed:
        raise UserError(
            f"{folder} cannot be resumed: these files were added, removed or changed since it began:\n  "
            f"{format_list(changed)}"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training the run in a folder. Raises UserError if one does."""
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder}: another process is training this run") from error
    except OSError as error:
        raise UserError(f"{lock.lock_file} cannot be written: {error}") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


# --- The best weights -------------------------------------------------------------------------

BEST_FILE = "best.pth"
# States are saved more rarely than the best weights, and a resumed run may train other weights than those
# that came after its state. So the older best weights take this name, with their iteration, for a while.
KEPT_BEST = "best_at_{}.pth"


def keep_best(folder: Path, iteration: int) -> None:
    """Keep `best.pth`, of `iteration`, until the next state is saved, unless an older one is kept."""
    best = folder / BEST_FILE
    with _renaming(best):
        if best.exists() and not _kept(folder):
            best.replace(folder / KEPT_BEST.format(iteration))


def remove_kept_best(folder: Path) -> None:
    """After a state was saved: it names the weights in `best.pth`."""
    for path in _kept(folder):
        with _renaming(path):
            path.unlink()


def restore_best(folder: Path, iteration: int | None) -> None:
    """When a run is resumed: bring back the best weights, of `iteration`, that its state names."""
    kept = folder / KEPT_BEST.format(iteration)
    with _renaming(kept):
        if kept.exists():
            kept.replace(folder / BEST_FILE)
    remove_kept_best(folder)


def _kept(folder: Path) -> list[Path]:
    return list(folder.glob(KEPT_BEST.format("*")))


@contextmanager
def _renaming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be renamed or removed: {error}") from error
