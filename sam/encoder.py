"""Image encoding: preprocessing, and a fast exact forward pass for the encoders of the SAM variants."""

from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn

from sam.cpu_layers import accelerate_tiny_vit_on_cpu, depthwise_conv, fuse_gelu, replace_norms
from sam.variants import VARIANTS


def move_to_device(
    sam: Sam, device: torch.device, low_precision: torch.dtype | None, *, train: str = "decoder"
) -> None:
    """Move a loaded model to `device`, and bring its image encoder into the fastest form for `train`.

    `train` is the value of --train. The encoder is accelerated and gets channels-last weights. Unless
    train is "encoder", its weights also become `low_precision`, which halves their memory. All parameters
    that train stay float32. Export takes the frozen weights from the loaded file, not from this model.
    """
    accelerate(sam.image_encoder, fold=train != "encoder")
    dtype = torch.float32 if train == "encoder" else low_precision or torch.float32
    if device.type == "cpu":
        replace_norms(sam.image_encoder)
        accelerate_tiny_vit_on_cpu(sam.image_encoder)
        if train == "decoder":  # no gradient passes through the encoder
            fuse_gelu(sam.image_encoder, dtype)
    sam.image_encoder.to(dtype).to(memory_format=torch.channels_last)
    sam.to(device)  # last, so that the device never holds float32 weights of a frozen encoder


def valid_pixels(sizes: Tensor, side: int, scale: float = 1.0) -> Tensor:
    """Mask of the pixels of a padded square grid that belong to the image.

    A grid pixel that lies only partly inside the image counts as padding. At least one row and one column
    are valid.

    Args:
        sizes: (B, 2) int, (h, w) of the images in the model's input frame.
        side: side length of the grid.
        scale: grid pixels per pixel of the input frame.

    Returns:
        (B, 1, side, side) bool.
    """
    limits = (sizes * scale).floor().clamp(min=1)
    steps = torch.arange(side, device=sizes.device)
    rows = steps < limits[:, 0:1]  # (B, side)
    columns = steps < limits[:, 1:2]
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def preprocess(images: Tensor, sizes: Tensor, model_type: str) -> Tensor:
    """Normalize images as the variant was trained; padding becomes 0.

    Args:
        images: (B, S, S, 3) uint8, RGB, padded at the bottom and on the right.
        sizes: (B, 2) int, (h, w) of the images without padding.
        model_type: a key of `VARIANTS`.

    Returns:
        (B, 3, S, S) float32, channels last, on the device of `images`.
    """
    valid = valid_pixels(sizes, images.shape[1])
    return VARIANTS[model_type].normalize(images.permute(0, 3, 1, 2).float(), valid)


def encode(sam: Sam, images: Tensor, sizes: Tensor, model_type: str, *, eager: bool = False) -> Tensor:
    """Compute image embeddings (B, C, e, e) in the precision of the encoder.

    On a CPU the images are encoded one by one: its caches hold the activations of one image. The
    embedding of an image then does not depend on the rest of its batch, to the last bit.

    Args:
        images, sizes, model_type: see `preprocess`; B may be 0.
        eager: do not use the version of the encoder that `nn.Module.compile()` made.
    """
    net = sam.image_encoder
    dtype = next(net.parameters()).dtype
    if len(images) == 0:
        shape = (0, sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size)
        return torch.empty(shape, dtype=dtype, device=images.device)
    x = preprocess(images, sizes, model_type).to(dtype, memory_format=torch.channels_last)
    forward = net.forward if eager else net
    trains = any(parameter.requires_grad for parameter in net.parameters())
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        if x.device.type == "cpu":
            return torch.cat([forward(image) for image in x.split(1)])
        return forward(x)


# --- Fast forward -------------------------------------------------------------------------------

# Attention scores of one slice of queries on a CPU: 128 MiB in bfloat16.
MAX_SCORES = 1 << 26
# By device: the lengths of vectors in attention are multiples of this number; on other devices, of 8.
WIDTH_MULTIPLES = {"cpu": 1}


def accelerate(encoder: nn.Module, *, fold: bool = True) -> None:
    """Replace slow modules inside an encoder, in place, by faster ones that compute the same.

    - `Attention` of SAM's ViT becomes `FusedAttention`.
    - `Conv2d_BN` of TinyViT (a convolution and BatchNorm in eval mode) becomes one convolution. With
      `fold` this is a plain `nn.Conv2d` with the scaled weights: its parameter names differ, and it is
      frozen. Without `fold` it is a `FrozenStatisticsConv`, which can train.

    A replacement takes over the parameters, their names (except with `fold`), device and dtype. For more of
    TinyViT on a CPU, see `cpu_layers`.
    """
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            replacement: nn.Module
            if isinstance(child, Attention):
                replacement = FusedAttention(child)
            elif not hasattr(child, "fuse"):  # only Conv2d_BN has this method
                continue
            elif fold:
                replacement = _folded(child)
            else:
                replacement = FrozenStatisticsConv(child)
            setattr(parent, name, replacement.train(child.training))


def _folded(conv_bn: Any) -> nn.Conv2d:
    """The frozen convolution that computes what TinyViT's `Conv2d_BN` computes in eval mode."""
    weight = conv_bn.c.weight
    with weight.device:  # `fuse` creates a module on the default device, in the default dtype
        return conv_bn.fuse().to(weight.dtype).requires_grad_(False)


class FrozenStatisticsConv(nn.Module):
    """TinyViT's convolution `c` and BatchNorm `bn` in eval mode, computed as one convolution.

    It scales the weights instead of every pixel. Gradients reach the parameters of both `c` and `bn`; the
    running statistics never change.
    """

    def __init__(self, conv_bn: Any) -> None:
        """Take over `c` and `bn` of a `Conv2d_BN`, under the same names."""
        super().__init__()
        self.c: nn.Conv2d = conv_bn.c
        self.bn: nn.BatchNorm2d = conv_bn.bn

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h', w')."""
        conv, norm = self.c, self.bn
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        weight = (conv.weight * scale[:, None, None, None]).to(memory_format=torch.channels_last)
        bias = norm.bias - norm.running_mean * scale
        if conv.groups > 1 and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return depthwise_conv(x, weight, bias, conv.stride[0])
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class FusedAttention(nn.Module):
    """SAM's `Attention` without the full matrix of (h w)^2 scores in memory.

    SAM adds two biases to the score of a query and a key, one for the key's row and one for its column
    (Li et al., MViTv2, CVPR 2022, eq. 4): q.k / sqrt(d) + row_bias[query, key's row] + column_bias[query,
    key's column]. `_augmented_attention` appends the biases to q and one-hot rows and columns to k; one
    product of the longer vectors, in a fused kernel, is then this sum. On a CPU, plain products for a
    slice of queries at a time are faster: `_sliced_attention`.
    """

    def __init__(self, attention: Attention) -> None:
        """Take over the parameters of an official `Attention` under the same names."""
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.qkv: nn.Module = attention.qkv
        self.proj: nn.Module = attention.proj
        self.use_rel_pos: bool = attention.use_rel_pos
        if self.use_rel_pos:
            self.rel_pos_h: nn.Parameter = attention.rel_pos_h
            self.rel_pos_w: nn.Parameter = attention.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) to (B, h, w, C)."""
        batch, height, width, _ = x.shape
        tokens = height * width
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, h w, d)
        if not self.use_rel_pos:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            row_embed = _relative_embeddings(self.rel_pos_h, height)  # (h, h, d)
            column_embed = _relative_embeddings(self.rel_pos_w, width)
            query = q.unflatten(2, (height, width))
            rows = torch.einsum("bnhwd,hkd->bnhwk", query, row_embed).flatten(2, 3)  # (B, heads, h w, h)
            columns = torch.einsum("bnhwd,wkd->bnhwk", query, column_embed).flatten(2, 3)
            # Slices save no memory in training: the backward pass needs all of them.
            sliced = x.device.type == "cpu" and not (torch.is_grad_enabled() and q.requires_grad)
            attend = _sliced_attention if sliced else _augmented_attention
            out = attend(q, k, v, rows, columns)
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, -1))


def _relative_embeddings(table: Tensor, length: int) -> Tensor:
    """The embedding of each query's position relative to each key's, along one axis.

    It computes what segment_anything's `get_rel_pos` computes for as many queries as keys. That function
    makes its indices on the CPU, and copying them to a CUDA device waits for the device.

    Args:
        table: (2 L - 1, d) float, the embeddings of the distances 1 - L to L - 1; another number of rows is
            interpolated to that.
        length: L, the number of queries and of keys.

    Returns:
        (L, L, d): query, key, channel.
    """
    n_distances = 2 * length - 1
    if len(table) != n_distances:
        table = F.interpolate(table.T[None], size=n_distances, mode="linear")[0].T
    steps = torch.arange(length, device=table.device)
    return table[steps[:, None] - steps + length - 1]


def _sliced_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attention with biases, at most `MAX_SCORES` scores at a time.

    Args:
        q, k, v: (B, heads, h w, d) float.
        rows: (B, heads, h w, h) float, the bias of each query for each row of keys.
        columns: (B, heads, h w, w) float, the bias of each query for each column of keys.

    Returns:
        (B, heads, h w, d).
    """
    batch, heads, tokens, width = q.shape
    step = max(1, MAX_SCORES // (batch * heads * tokens))
    k = (k * width**-0.5).transpose(-2, -1)
    slices = []
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        scores = (q[:, :, part] @ k).unflatten(3, (rows.shape[-1], columns.shape[-1]))
        scores = scores + rows[:, :, part, :, None] + columns[:, :, part, None, :]
        slices.append(scores.flatten(3).softmax(dim=-1) @ v)
    return torch.cat(slices, dim=2)


def _augmented_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The same as `_sliced_attention`, in one kernel without a bias, so that flash attention can run it.

    Fused CUDA kernels need vectors of a multiple of 8 numbers. For others, PyTorch takes the slow kernel on
    some devices and copies q, k and v on the rest. Zeros fill them up; they add nothing to a score.
    """
    batch, heads, tokens, width = q.shape
    token = torch.arange(tokens, device=q.device)
    row, column = token // columns.shape[-1], token % columns.shape[-1]
    one_hot = torch.cat([F.one_hot(row, rows.shape[-1]), F.one_hot(column, columns.shape[-1])], dim=-1)
    n_zeros = -(width + one_hot.shape[-1]) % WIDTH_MULTIPLES.get(q.device.type, 8)
    one_hot = F.pad(one_hot, (0, n_zeros)).to(k.dtype)
    k = torch.cat([k, one_hot.expand(batch, heads, -1, -1)], dim=-1)
    zeros = q.new_zeros(1).expand(batch, heads, tokens, n_zeros)
    q = torch.cat([q * width**-0.5, rows, columns, zeros], dim=-1)
    v = F.pad(v, (0, q.shape[-1] - width))  # flash attention needs q, k and v of one width
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :width]
