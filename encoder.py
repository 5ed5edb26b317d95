"""The image encoders of SAM and LiteMedSAM: faster with the same results, and made to train."""

import warnings
from collections.abc import Iterator
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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


# --- Training an encoder ------------------------------------------------------------------------

# Attention and MLP projections of SAM's ViT and of TinyViT.
PROJECTIONS = r".*(attn\.(qkv|proj)|mlp\.(lin1|lin2|fc1|fc2))"


def add_lora(encoder: nn.Module, *, rank: int, alpha: float) -> None:
    """Add trainable low-rank adapters to the projections (Hu et al., LoRA, ICLR 2022), in float32."""
    with warnings.catch_warnings():  # of bitsandbytes and other packages that are not there
        warnings.simplefilter("ignore")
        from peft import LoraConfig, inject_adapter_in_model
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=PROJECTIONS), encoder)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lora_deltas(encoder: nn.Module) -> dict[str, Tensor]:
    """What the adapters add to the official weights, by their names inside the encoder."""
    return {
        f"{name}.weight": module.get_delta_weight("default").detach()
        for name, module in encoder.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def unfreeze(encoder: nn.Module) -> None:
    """Let all weights train; BatchNorm keeps its statistics, since the encoder stays in eval mode."""
    encoder.requires_grad_(True)
    for module in encoder.modules():
        if hasattr(module, "attention_bias_idxs"):
            # In eval mode TinyViT's attention uses biases cached when they were loaded.
            module.train()


def checkpoint_blocks(encoder: nn.Module) -> None:
    """Keep only the inputs of the blocks for the backward pass, which computes the rest again."""
    for block in blocks(encoder):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def blocks(encoder: nn.Module) -> list[nn.Module]:
    """The blocks of a ViT or a TinyViT, in order."""
    if hasattr(encoder, "blocks"):
        return list(encoder.blocks)
    return [block for layer in encoder.layers for block in layer.blocks]


def by_depth(encoder: nn.Module) -> Iterator[tuple[int, nn.Parameter]]:
    """The trainable parameters with their distance from the output: 0 for the neck, 1 for the last block.

    What stands before a block, such as an embedding or a downsampling, counts as part of it.
    """
    order = blocks(encoder)
    depth = {id(p): len(order) - i for i, block in enumerate(order) for p in block.parameters()}
    neck = {id(p) for p in encoder.neck.parameters()}
    current = len(order)
    for parameter in encoder.parameters():  # in the order of the forward pass, but for the position's
        current = 0 if id(parameter) in neck else depth.get(id(parameter), current)
        if parameter.requires_grad:
            yield current, parameter
