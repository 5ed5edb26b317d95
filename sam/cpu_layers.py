"""Layers of TinyViT that compute the same faster on a CPU, in training and in inference."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Attention scores that are computed at a time: 2 MiB in float32.
MAX_SCORES = 1 << 19


def accelerate_tiny_vit_on_cpu(encoder: Any) -> None:
    """Replace the attention of a TinyViT and the norms of its neck, in place. Does nothing to other encoders.

    A replacement takes over the parameters and their names.
    """
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "attention_bias_idxs"):  # only TinyViT's Attention has this buffer
                setattr(parent, name, WindowAttention(child).train(child.training))
    if hasattr(encoder, "layers"):  # a TinyViT
        for i in (1, 3):
            encoder.neck[i] = ChannelNorm(encoder.neck[i]).train(encoder.training)


# --- Attention ----------------------------------------------------------------------------------


class WindowAttention(nn.Module):
    """TinyViT's attention inside windows: softmax(q k^T / sqrt(d) + bias) v in every head.

    The bias of a query and a key is a trained number for each |dy|, |dx| between them. The official module
    makes several copies of the scores of all windows, which do not fit into the CPU cache. Here they are made
    for a few windows at a time, and only the probabilities are kept, in the precision of the products.
    """

    def __init__(self, attention: Any) -> None:
        """Take over the parameters of an official `Attention` under the same names."""
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.norm: nn.Module = attention.norm
        self.qkv: nn.Module = attention.qkv
        self.proj: nn.Module = attention.proj
        self.attention_biases: nn.Parameter = attention.attention_biases
        self.attention_bias_idxs: Tensor
        self.register_buffer("attention_bias_idxs", attention.attention_bias_idxs, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(windows, n, C) to (windows, n, C)."""
        n_windows, n, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(n_windows, n, self.num_heads, 3, -1)
        # Softmax is faster in float32, and `index_select` faster than an index.
        bias = self.attention_biases.to(torch.promote_types(x.dtype, torch.float32))
        bias = bias.index_select(1, self.attention_bias_idxs.flatten()).view(-1, n, n)
        if torch.compiler.is_compiling():
            q, k, v = qkv.permute(3, 0, 2, 1, 4)
            scores = torch.add(bias, q @ k.transpose(-2, -1), alpha=q.shape[-1] ** -0.5)
            out = (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2)
        else:
            out = _Attend.apply(qkv, bias)
        return self.proj(out.flatten(2))


class _Attend(torch.autograd.Function):
    """Attention in all windows. The backward pass takes the probabilities from the forward pass."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor) -> Tensor:
        """qkv (windows, n, heads, 3, d) and bias (heads, n, n) to (windows, n, heads, d)."""
        n_windows, n, heads, _, width = qkv.shape
        out = qkv.new_empty(n_windows, n, heads, width)
        kept = []
        for part in _parts(qkv):
            q, k, v = _matrices(qkv[part])
            scores = torch.bmm(q, k.transpose(1, 2)).view(-1, heads, n, n)
            probs = torch.add(bias, scores, alpha=width**-0.5).softmax(dim=-1).to(qkv.dtype)
            probs = probs.view(-1, n, n)
            out[part] = torch.bmm(probs, v).view(-1, heads, n, width).transpose(1, 2)
            if any(ctx.needs_input_grad):
                kept.append(probs)
        ctx.save_for_backward(qkv, *kept)
        ctx.bias_dtype = bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of `qkv` and `bias`, by the rules for products and for softmax."""
        qkv, *kept = ctx.saved_tensors
        _, n, heads, _, width = qkv.shape
        grad_qkv = torch.empty_like(qkv)
        grad_bias = qkv.new_zeros(heads, n, n, dtype=ctx.bias_dtype)
        for part, probs in zip(_parts(qkv), kept, strict=True):
            q, k, v = _matrices(qkv[part])
            grad_out = grad[part].transpose(1, 2).reshape(-1, n, width)
            grad_probs = torch.bmm(grad_out, v.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            if ctx.needs_input_grad[1]:  # not with LoRA
                for window in grad_scores.view(-1, heads, n, n):
                    grad_bias += window
            grads = (
                torch.bmm(grad_scores, k).mul_(width**-0.5),
                torch.bmm(grad_scores.transpose(1, 2), q).mul_(width**-0.5),
                torch.bmm(probs.transpose(1, 2), grad_out),
            )
            for i, matrices in enumerate(grads):
                grad_qkv[part, :, :, i] = matrices.view(-1, heads, n, width).transpose(1, 2)
        return grad_qkv, grad_bias if ctx.needs_input_grad[1] else None


def _parts(qkv: Tensor) -> list[slice]:
    """Slices of windows; each has at most `MAX_SCORES` scores, but at least one window."""
    n_windows, n, heads = qkv.shape[:3]
    step = max(1, MAX_SCORES // (heads * n * n))
    return [slice(start, start + step) for start in range(0, n_windows, step)]


def _matrices(qkv: Tensor) -> list[Tensor]:
    """q, k and v of every window and head (windows * heads, n, d), of qkv (windows, n, heads, 3, d)."""
    return [matrices.flatten(0, 1) for matrices in qkv.permute(3, 0, 2, 1, 4)]


# --- Convolution --------------------------------------------------------------------------------


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """A depthwise 3x3 convolution with padding 1, in the precision of `x`.

    Args:
        x: (B, C, h, w) float, channels last; h and w are multiples of the stride.
        weight: (C, 1, 3, 3) float.
        bias: (C,) float.
        stride: 1 or 2.

    Returns:
        (B, C, h / stride, w / stride).
    """
    # The conversion is here because autograd does not see inside of an `autograd.Function`.
    assert weight.shape[1:] == (1, 3, 3)
    return _DepthwiseConv.apply(x, weight.to(x.dtype), bias.to(x.dtype), stride)


class _DepthwiseConv(torch.autograd.Function):
    """A depthwise 3x3 convolution with padding 1, whose backward pass is fast on a CPU.

    PyTorch's gradient of the input takes three times as long as the forward pass, and 18 times as long with a
    stride of 2. But it is itself such a convolution: of the output's gradient, with the flipped kernel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, weight, bias, stride, padding=1, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        groups, stride = len(weight), ctx.stride
        only_weights = [False, True, True]
        _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, [groups], [stride] * 2, [1, 1], [1, 1], False, [0, 0], groups, only_weights
        )
        if stride > 1:  # zeros between the pixels of the gradient undo the stride
            spread = torch.zeros_like(x)
            spread[:, :, ::stride, ::stride] = grad
            grad = spread
        grad_x = F.conv2d(grad, weight.flip(2, 3), padding=1, groups=groups)
        return grad_x, grad_weight, grad_bias, None


# --- Norms --------------------------------------------------------------------------------------


def layer_norm(norm: Any, x: Tensor) -> Tensor:
    """Normalize the channels of x (..., C) in the precision of the parameters, which autocast does not do.

    In bfloat16, PyTorch's kernel for CPUs also adds up the gradients of the parameters over all pixels in
    bfloat16, which makes them wrong by 30 to 70 %.

    norm: a `LayerNorm`, or SAM's `LayerNorm2d`, which has the same parameters.
    """
    return F.layer_norm(x.to(norm.weight.dtype), norm.weight.shape, norm.weight, norm.bias, norm.eps)


class TokenNorm(nn.Module):
    """A `LayerNorm` that computes as `layer_norm` does."""

    def __init__(self, norm: Any) -> None:
        """Take over the parameters of a `LayerNorm` or `LayerNorm2d` under the same names."""
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self.bias: nn.Parameter = norm.bias
        self.eps: float = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same shape."""
        return layer_norm(self, x)


class ChannelNorm(TokenNorm):
    """SAM's `LayerNorm2d`, which normalizes the channels of each pixel, as one fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w), channels last, to the same shape and layout."""
        return layer_norm(self, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def replace_norms(encoder: nn.Module) -> None:
    """Replace every `LayerNorm` of an encoder by a `TokenNorm`, in place."""
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(parent, name, TokenNorm(child).train(child.training))


# --- GELU of frozen layers ----------------------------------------------------------------------


def fuse_gelu(encoder: nn.Module, dtype: torch.dtype) -> None:
    """Fuse each GELU of a frozen TinyViT with the layer before it, in place, if oneDNN computes in `dtype`.

    Gradients cannot pass through the fused layers. Names of parameters change.
    """
    # These operators are not part of PyTorch's public interface.
    has_fused_layers = all(
        hasattr(torch.ops.mkldnn, name) for name in ("_convolution_pointwise", "_linear_pointwise")
    )
    if not torch.backends.mkldnn.is_available() or not has_fused_layers:
        return
    if dtype != torch.float32 and not (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return
    for block in list(encoder.modules()):
        for layers, activation in ACTIVATIONS:
            if isinstance(getattr(block, activation, None), nn.GELU) and hasattr(block, layers[0]):
                for layer in layers:
                    setattr(block, layer, LayerWithGelu(getattr(block, layer)))
                setattr(block, activation, nn.Identity())


# The layers and the GELU after them: in TinyViT's MBConv (twice), PatchMerging and Mlp.
ACTIVATIONS = [(("conv1",), "act1"), (("conv2",), "act2"), (("conv1", "conv2"), "act"), (("fc1",), "act")]


class LayerWithGelu(nn.Module):
    """A frozen convolution or linear layer and the GELU after it, in one kernel of oneDNN.

    The results of the layer stay in the CPU cache until their GELU.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The shapes of the layer."""
        layer = self.layer
        gelu: tuple[str, list[float], str] = ("gelu", [], "none")  # "none": no approximation
        if torch.compiler.is_compiling():
            return F.gelu(layer(x))
        if isinstance(layer, nn.Conv2d):
            options = layer.padding, layer.stride, layer.dilation, layer.groups
            return torch.ops.mkldnn._convolution_pointwise(x, layer.weight, layer.bias, *options, *gelu)
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, *gelu)
