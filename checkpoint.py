"""Checkpoints: strict and safe loads, saved weights, and the state from which a run resumes.

Loads never run code from a file (`weights_only=True`). Writes are atomic.
"""

import hashlib
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict, get_origin, get_type_hints

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from base.atomic import write_atomically
from base.errors import UserError
from imaging.files import format_list
from sam.variants import VARIANTS
from sidecar import sidecar_path
from train_config import MAY_CHANGE_ON_RESUME

BEST_FILE, LAST_FILE = "best.pth", "last.pth"  # in exp/NAME/checkpoints
RESUME_FILE = "resume.pth"  # in exp/NAME
LOCK_FILE = ".lock"  # in exp/NAME while a run is under way

# --- Weights ----------------------------------------------------------------------------------


def save_weights(state_dict: dict[str, Tensor], path: Path) -> None:
    """Save a plain `state_dict`, on the CPU, as segment_anything's builders read it."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    write_atomically(path, lambda file: torch.save(on_cpu, file))


HF_WEIGHTS = "model.safetensors"  # in a folder that transformers' `save_pretrained` wrote
# What training loops put around a state_dict: MedSAM and others "model", Lightning "state_dict".
WRAPPERS = ("state_dict", "model", "model_state_dict")
PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
ANCHOR = "mask_decoder.iou_token.weight"  # every SAM has it


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a `state_dict` with official names.

    Accepts a plain one; one inside a dict of a training loop (see `WRAPPERS`); names with a prefix, such as
    `module.` or `model.sam.`; and a folder of transformers' SamModel, or its file HF_WEIGHTS.

    Raises UserError, which names the file, if it is missing, truncated, holds anything that could run code,
    or is none of these. A state for `--resume` is refused, and the message names the weights to give.
    """
    if os.path.isdir(path) or path.suffix == ".safetensors":
        return _official_names(_load_safetensors(weights_file(path)), path)
    state_dict = _load(path)
    if isinstance(state_dict, dict):
        if state_dict.keys() >= {"train_state", "weights"}:
            last = path.parent / "checkpoints" / LAST_FILE
            raise UserError(f"{path} is the state for --resume, not a checkpoint: give {last}")
        inner = next((state_dict[key] for key in WRAPPERS if isinstance(state_dict.get(key), dict)), None)
        state_dict = state_dict if inner is None else inner
    is_plain = isinstance(state_dict, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state_dict.items()
    )
    if not is_plain:
        raise UserError(
            f"{path} is not a plain state_dict and holds none under {', '.join(WRAPPERS)}: "
            "save model.state_dict() alone with torch.save"
        )
    return _without_prefix(state_dict, path)


def _without_prefix(state_dict: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights of the SAM in a model that holds one, under their official names.

    Raises UserError if it holds several, such as a teacher and a student.
    """
    prefixes = [name.removesuffix(ANCHOR) for name in state_dict if name.endswith(ANCHOR)]
    if prefixes in ([], [""]):
        return state_dict
    if len(prefixes) > 1:
        listed = ", ".join(f"{prefix or 'no prefix'}" for prefix in prefixes)
        raise UserError(
            f"{path} holds the weights of several models, with the prefixes {listed}: "
            "save those of one of them alone with torch.save"
        )
    starts = tuple(prefixes[0] + part for part in PARTS)
    return {name.removeprefix(prefixes[0]): w for name, w in state_dict.items() if name.startswith(starts)}


def weights_file(path: Path) -> Path:
    """The file with the weights: `path` itself, or HF_WEIGHTS in it if it is a folder."""
    return path / HF_WEIGHTS if os.path.isdir(path) else path


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError  # needed for this format only
    from safetensors.torch import load_file

    if not path.is_file():
        run = sorted((path.parent / "checkpoints").glob("*.pth"))
        hint = f"give {run[0]}" if run else "expected a .pth file or a folder of SamModel"
        raise UserError(f"checkpoint not found: {path}; {hint}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors; is it truncated? ({error})") from error


def file_digest(path: Path) -> str:
    """Hash of the bytes of a file of weights; see `weights_file`."""
    path = weights_file(path)
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
    if path.suffix == ".onnx":
        raise UserError(f"{path} is an ONNX file; give the .pth file that it was exported from")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is damaged, or could run code when loaded. If you trust it, save its "
            "weights alone: torch.save(model.state_dict(), PATH)"
        ) from error
    except OSError as error:  # of the disk or the permissions: the file itself may be intact
        raise UserError(f"{path} cannot be read: {error}") from error
    except (RuntimeError, EOFError, ValueError, LookupError, struct.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a checkpoint; is it truncated? ({error})") from error


# --- Names of transformers --------------------------------------------------------------------

# Patterns in the official names of weights, and what transformers has in their place; applied in this order.
HF_NAMES = (
    (r"^image_encoder\.", "vision_encoder."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"vision_encoder\.blocks\.", "vision_encoder.layers."),
    (r"neck\.0\.", "neck.conv1."),
    (r"neck\.1\.", "neck.layer_norm1."),
    (r"neck\.2\.", "neck.conv2."),
    (r"neck\.3\.", "neck.layer_norm2."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"norm_final_attn", "layer_norm_final_attn"),
    (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    (r"point_embeddings\.", "point_embed."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"output_upscaling\.0\.", "upscale_conv1."),
    (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"(hypernetworks_mlps\.\d|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(hypernetworks_mlps\.\d|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(hypernetworks_mlps\.\d|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
)


def hf_name(name: str) -> str:
    """The name that transformers' SamModel has for a weight with this official name."""
    for pattern, replacement in HF_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _official_names(state_dict: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The official `state_dict` of a SamModel's. Raises UserError if it is not that of a known variant."""
    # transformers has one weight under two names, and saves it under one of them.
    shared, position = "shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding."
    weights = {name: weight for name, weight in state_dict.items() if name != shared}
    if shared in state_dict:
        weights.setdefault(f"{position}positional_embedding", state_dict[shared])
    for variant in VARIANTS.values():
        name, shape = variant.fingerprint
        if hf_name(name) in weights and tuple(weights[hf_name(name)].shape) == shape:
            with torch.device("meta"):
                names = {hf_name(name): name for name in variant.build().state_dict()}
            if names.keys() == weights.keys():
                return {name: weights[of_hf] for of_hf, name in names.items()}
    raise UserError(f"{path} does not hold the weights of a SamModel as transformers saves them")


# --- Resuming ---------------------------------------------------------------------------------

# The value of `--amp` that asks for a precision.
AMP_CHOICES = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}


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


def load_resume_state(path: Path, way: str = "start the run again") -> ResumeState:
    """Read what `save_resume_state` wrote.

    Raises UserError, which names `path`, and says why if the file cannot be read. If it is damaged or of
    another version, the message ends with `way`: what the user can do.
    """
    try:
        state = _load(path)
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise UserError(f"{path} cannot be read, and may be damaged: {way}") from error
    types = get_type_hints(ResumeState)
    if not (
        isinstance(state, dict)
        and state.keys() == types.keys()
        and all(isinstance(state[key], get_origin(kind) or kind) for key, kind in types.items())
        and all(isinstance(weight, Tensor) for weight in state["weights"].values())
    ):
        raise UserError(f"{path} is not a state that this version saved: {way}")
    return state  # type: ignore[return-value]  # its keys are checked


def require_finite(weights: dict[str, Tensor], path: Path, way: str) -> None:
    """Raise UserError, which names `path` and the first such weight, if weights are NaN or infinite.

    way: what the user can do.
    """
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(f"{path} holds weights that are NaN or infinite, such as {name}: {way}")


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


# --- The best weights -------------------------------------------------------------------------

# States are saved more rarely than the best weights, and a resumed run may train other weights than those
# that came after its state. So the older best weights take this name, with their iteration, for a while.
KEPT_BEST = "best_at_{}.pth"


def keep_best(folder: Path, iteration: int) -> None:
    """Keep `best.pth`, of `iteration`, and its sidecar until the next state is saved.

    Nothing happens if older ones are kept.
    """
    best, kept = folder / BEST_FILE, folder / KEPT_BEST.format(iteration)
    with _renaming(best):
        if best.exists() and not _kept(folder):
            best.replace(kept)
            _move_if_there(sidecar_path(best), sidecar_path(kept))


def remove_kept_best(folder: Path) -> None:
    """After a state was saved: it names the weights in `best.pth`, if these could be written."""
    for path in _kept(folder) if (folder / BEST_FILE).exists() else ():
        with _renaming(path):
            sidecar_path(path).unlink(missing_ok=True)
            path.unlink()


def restore_best(folder: Path, iteration: int | None) -> None:
    """When a run is resumed: bring back the best weights, of `iteration`, that its state names."""
    best, kept = folder / BEST_FILE, folder / KEPT_BEST.format(iteration)
    with _renaming(kept):
        if kept.exists():
            _move_if_there(sidecar_path(kept), sidecar_path(best))
            kept.replace(best)
    remove_kept_best(folder)


def _kept(folder: Path) -> list[Path]:
    """The kept weights. Other files of a similar name are the user's."""
    paths = folder.glob(KEPT_BEST.format("*"))
    return [path for path in paths if path.stem.rpartition("_")[2].isdigit()]


def _move_if_there(path: Path, target: Path) -> None:
    if path.exists():
        path.replace(target)


@contextmanager
def _renaming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be renamed or removed: {error}") from error


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Remove the checkpoints of epochs except for the last `keep`, each with its sidecar."""
    numbers = {path: path.stem.removeprefix("epoch_") for path in folder.glob("epoch_*.pth")}
    ours = [path for path, number in numbers.items() if number.isdigit()]  # not "epoch_0010 copy.pth"
    for path in sorted(ours, key=lambda path: int(numbers[path]))[:-keep]:
        try:
            path.unlink()
            sidecar_path(path).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--keep_last: {path} cannot be removed: {error}") from error
