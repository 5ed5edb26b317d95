"""Image encoding: preprocessing and a fast, exact forward pass of SAM's and LiteMedSAM's encoders."""

from types import MethodType

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from torch import Tensor, nn

from sam.variants import VARIANTS


def move_to_device(
    sam: Sam, device: torch.device, low_precision: torch.dtype | None, *, train: str = "decoder"
) -> None:
    """Move a loaded model to its device, with the image encoder in its fastest form for `train`.

    The encoder is accelerated and, unless it trains itself, takes its compute type, which halves its
    memory and, with channels last, its time on a CPU; what trains stays float32. A checkpoint takes
    frozen weights from what was loaded, not from here.
    """
    sam.to(device)
    accelerate(sam.image_encoder, fold=train != "encoder")
    dtype = torch.float32 if train == "encoder" else low_precision or torch.float32
    sam.image_encoder.to(dtype).to(memory_format=torch.channels_last)


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
    """Normalize as the variant was trained; padding becomes 0.

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


# --- Fast forward -------------------------------------------------------------------------------

# Scores that `vit_attention` builds at a time on a CPU: 128 MiB in bfloat16.
SCORES_AT_ONCE = 1 << 26


def accelerate(encoder: nn.Module, *, fold: bool = True) -> None:
    """Give ViT's attention a fused kernel, and compute TinyViT's BatchNorm as part of its convolutions.

    `fold` does the latter once and for all, which changes the names of the weights: it is for those that
    do not train. Else it is done anew in every pass. (A fused kernel for TinyViT's attention, over windows
    of 49 or 196 pixels, makes it slower on a CPU.)
    """
    for module in list(encoder.modules()):
        if isinstance(module, Attention):
            module.forward = MethodType(vit_attention, module)
        for name, child in list(module.named_children()):
            if not hasattr(child, "fuse"):  # TinyViT's convolution with BatchNorm
                continue
            if fold:
                setattr(module, name, child.fuse().requires_grad_(False))
            else:
                child.forward = MethodType(convolution_with_frozen_statistics, child)


def convolution_with_frozen_statistics(self: nn.Sequential, x: Tensor) -> Tensor:
    """What TinyViT's convolution `c` and BatchNorm `bn` in eval mode compute, as one convolution.

    Only weights are scaled instead of every pixel, and gradients flow to those of both.
    """
    conv, norm = self.c, self.bn
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = (conv.weight * scale[:, None, None, None]).to(memory_format=torch.channels_last)
    return F.conv2d(
        x,
        weight,
        norm.bias - norm.running_mean * scale,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
    )


def vit_attention(self: Attention, x: Tensor) -> Tensor:
    """What the official layer computes for x (B, h, w, C), without its matrix of (h w)^2 scores.

    SAM adds to the score of a query and a key a bias for their rows and one for their columns
    (Li et al., MViTv2, CVPR 2022, eq. 4): q.k / sqrt(d) + row[query, key's row] + column[query, key's
    column]. Elsewhere than on a CPU they are never built: with the two terms appended to q, and one-hot
    rows and columns to k, one product of longer vectors in a fused kernel is that sum. A CPU is faster
    with plain products, a slice of the queries at a time.
    """
    batch, height, width, _ = x.shape
    tokens = height * width
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, h w, d)
    if not self.use_rel_pos:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        of_rows = get_rel_pos(height, height, self.rel_pos_h)  # (h, h, d)
        of_columns = get_rel_pos(width, width, self.rel_pos_w)
        query = q.unflatten(2, (height, width))
        rows = torch.einsum("bnhwd,hkd->bnhwk", query, of_rows).flatten(2, 3)  # (B, heads, h w, h)
        columns = torch.einsum("bnhwd,wkd->bnhwk", query, of_columns).flatten(2, 3)
        # In the backward pass the slices would be kept, all of them.
        sliced = x.device.type == "cpu" and not (torch.is_grad_enabled() and q.requires_grad)
        attend = _in_slices if sliced else _with_longer_vectors
        out = attend(q, k, v, rows, columns)
    return self.proj(out.transpose(1, 2).reshape(batch, height, width, -1))


def _in_slices(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attention (B, heads, h w, d) with the bias rows (B, heads, h w, h) + columns (..., w)."""
    batch, heads, tokens, width = q.shape
    step = max(1, SCORES_AT_ONCE // (batch * heads * tokens))
    k = (k * width**-0.5).transpose(-2, -1)
    parts = []
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        scores = (q[:, :, part] @ k).unflatten(3, (rows.shape[-1], columns.shape[-1]))
        scores = scores + rows[:, :, part, :, None] + columns[:, :, part, None, :]
        parts.append(scores.flatten(3).softmax(dim=-1) @ v)
    return torch.cat(parts, dim=2)


def _with_longer_vectors(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The same in one kernel without a bias, which flash attention takes."""
    batch, heads, tokens, width = q.shape
    token = torch.arange(tokens, device=q.device)
    row, column = token // columns.shape[-1], token % columns.shape[-1]
    one_hot = torch.cat([F.one_hot(row, rows.shape[-1]), F.one_hot(column, columns.shape[-1])], dim=-1)
    k = torch.cat([k, one_hot.to(k.dtype).expand(batch, heads, -1, -1)], dim=-1)
    q = torch.cat([q * width**-0.5, rows, columns], dim=-1)
    v = F.pad(v, (0, q.shape[-1] - width))  # flash attention wants one width for all
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :width]
