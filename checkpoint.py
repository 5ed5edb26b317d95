"""Files of weights: strict and safe loads, atomic writes, and which of them a run keeps."""

import hashlib
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.atomic import write_atomically
from base.errors import UserError
from sam.variants import VARIANTS
from sidecar import sidecar_path

BEST_FILE, LAST_FILE = "best.pth", "last.pth"  # in exp/NAME/checkpoints

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
    state_dict = safe_load(path)
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
        if isinstance(error, SafetensorError):
            refuse_text(path)
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


def require_finite(weights: dict[str, Tensor], path: Path, hint: str) -> None:
    """Raise UserError, which names `path` and the first such weight, if weights are NaN or infinite.

    hint: what the user can do.
    """
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(f"{path} holds weights that are NaN or infinite, such as {name}: {hint}")


# Texts that a download may leave in the place of weights: their first bytes, and what the file is.
TEXTS = {
    b"version https://git-lfs.github.com/spec/v1": "a Git LFS pointer, not the weights: run git lfs pull",
    b"<": "a web page, not the weights: download them again",
}


def refuse_text(path: Path) -> None:
    """Raise UserError, which says what the file is, if a file that does not load is one of `TEXTS`."""
    with path.open("rb") as file:
        start = file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()  # web pages may begin with blank lines
    for text, meaning in TEXTS.items():
        if start.startswith(text):
            raise UserError(f"{path} is {meaning}")


def safe_load(path: Path) -> Any:
    """What `torch.save` wrote to a file; code in it is never run."""
    if not os.path.isfile(path):  # False also for a path that cannot be asked for
        raise UserError(f"checkpoint not found: {path}")
    if path.suffix == ".onnx":
        raise UserError(f"{path} is an ONNX file; give the .pth file that it was exported from")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refuse_text(path)
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
    """Remove the kept weights, once a state is saved that names those in `best.pth`."""
    for path in _kept(folder) if (folder / BEST_FILE).exists() else ():
        with _renaming(path):
            sidecar_path(path).unlink(missing_ok=True)
            path.unlink()


def restore_best(folder: Path, iteration: int | None) -> None:
    """Restore the best weights, those of `iteration`, that the state of a resumed run names."""
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
