"""Resuming a run: the state that it saves, what may not change, and the lock of its folder."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict, get_origin, get_type_hints

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from base.atomic import write_atomically
from base.errors import UserError
from checkpoint import BEST_FILE, LAST_FILE, require_finite, safe_load
from imaging.files import format_list
from train_config import MAY_CHANGE_ON_RESUME

RESUME_FILE = "resume.pth"  # in exp/NAME
LOCK_FILE = ".lock"  # in exp/NAME while a run is under way

# --- State ------------------------------------------------------------------------------------


class ResumeState(TypedDict):
    """What a run needs to continue, beside the weights it started from.

    train_state: `TrainState.state_dict()`.
    weights: everything that trains, by name.
    gradients: the sum so far of an unfinished optimizer step, by name; else empty.
    flags, config, files: what the run was started with: flags by name, the data's config as JSON, and
        `dataset_index.file_digests`.
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


def load_resume_state(path: Path, hint: str = "start the run again") -> ResumeState:
    """Read what `save_resume_state` wrote.

    Raises UserError, which names `path`, and says why if the file cannot be read. If it is damaged or of
    another version, the message ends with `hint`: what the user can do.
    """
    try:
        state = safe_load(path)
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise UserError(f"{path} cannot be read, and may be damaged: {hint}") from error
    types = get_type_hints(ResumeState)
    if not (
        isinstance(state, dict)
        and state.keys() == types.keys()
        and all(isinstance(state[key], get_origin(kind) or kind) for key, kind in types.items())
        and all(isinstance(weight, Tensor) for weight in state["weights"].values())
    ):
        raise UserError(f"{path} is not a state that this version saved: {hint}")
    return state  # type: ignore[return-value]  # its keys are checked


def find_resume_state(folder: Path) -> ResumeState | None:
    """The saved state of a run; None if the run died before it saved a state or weights, and starts again."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run to resume (--exp_name, --resume)")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(f"{folder} may not be read or written; change its permissions to resume it")
    weights = max(folder.glob("checkpoints/*.pth"), key=lambda path: path.stat().st_mtime, default=None)
    if not (folder / RESUME_FILE).exists():
        if weights is None:
            return None
        raise UserError(
            f"{folder / RESUME_FILE} is missing, and no run continues without it; start a new run with "
            f"another --exp_name and --checkpoint {weights}"
        )
    best = folder / "checkpoints" / BEST_FILE
    weights_left = f" and --checkpoint {best}" if best.exists() else ""
    hint = f"start the run again with another --exp_name{weights_left}"
    state = load_resume_state(folder / RESUME_FILE, hint)
    require_finite(state["weights"], folder / RESUME_FILE, f"{hint}; a lower --lr may help")
    return state


# --- What may not change ----------------------------------------------------------------------

# The value of `--amp` that asks for a precision.
AMP_CHOICES = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}


def check_same_settings(
    state: ResumeState, *, flags: dict[str, Any], config: str, world_size: int, folder: Path
) -> None:
    """Raise UserError, with both values, for every flag or data setting that may not change on resume."""
    faults = [
        f"--{name}: was {state['flags'].get(name)}, is now {value}"
        for name, value in flags.items()
        if name not in (*MAY_CHANGE_ON_RESUME, "exp_name") and state["flags"].get(name) != value
    ]
    if state["world_size"] != world_size:
        faults.append(f"processes: were {state['world_size']}, are now {world_size}")
    faults += _changed_keys(json.loads(state["config"])["dataset"], json.loads(config)["dataset"])
    if faults:
        raise UserError("\n  ".join([f"{folder} cannot be resumed with other settings:", *faults]))


def _changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the data of two configs, except the paths of folders: they may have been moved."""
    before, now = _by_dataset(before), _by_dataset(now)
    faults = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if old is None or new is None:
            was, is_now = (keys["data_dir"] if keys else "missing" for keys in (old, new))
            faults.append(f"{name}: was {was}, is now {is_now}")
            continue
        for keys in (old, new):
            keys.pop("data_dir")
            keys["bg_paths"] = f"{len(keys['bg_paths'])} folder(s)"
        faults += [
            f"{name}.{key}: was {old.get(key)}, is now {new.get(key)}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
    return faults


def _by_dataset(data: dict[str, Any]) -> dict[str, Any]:
    """The keys of every dataset, by its name in the YAML file."""
    train = {f"dataset.train[{number}]": keys for number, keys in enumerate(data["train"])}
    return train | ({"dataset.test": data["test"]} if data["test"] else {})


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
    """Raise UserError if files were added, removed or changed; it names them, and says how to go on."""
    before = state["files"]
    faults = [f"changed: {name}" for name in digests if before.get(name, digests[name]) != digests[name]]
    faults += [f"added: {name}" for name in digests if name not in before]
    faults += [f"removed: {name}" for name in before if name not in digests]
    if not faults:
        return
    names = [folder / "checkpoints" / name for name in (LAST_FILE, BEST_FILE)]
    weights = next((f" and --checkpoint {path}" for path in names if path.exists()), "")
    raise UserError(
        f"{folder} cannot be resumed, because its data has changed since it began:\n  "
        f"{format_list(faults)}\n"
        f"To train with the data as it is now, start a new run with another --exp_name{weights}."
    )


# --- Lock -------------------------------------------------------------------------------------


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
        with suppress(OSError):  # Windows may refuse to remove an open file; filelock removes it then
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
