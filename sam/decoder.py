"""Decoding: image embeddings and prompts to mask logits, one batch at a time."""

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, Sam
from segment_anything.modeling.transformer import Attention, TwoWayTransformer
from torch import Tensor, nn

from sam.cpu_layers import layer_norm
from sam.point_labels import (
    ABSENT,
    BACKGROUND_POINT,
    BOX_CORNER_1,
    BOX_CORNER_2,
    FOREGROUND_POINT,
    NOT_A_POINT,
)

# The labels of points that have a position, in the order of `PromptEncoder.point_embeddings`.
POSITION_LABELS = BACKGROUND_POINT, FOREGROUND_POINT, BOX_CORNER_1, BOX_CORNER_2


def mask_grid(sam: Sam) -> int:
    """Side length of the decoder's low-resolution logits (256 for every published SAM)."""
    return 4 * sam.prompt_encoder.image_embedding_size[0]


def decode(sam: Sam, embeddings: Tensor, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Decode a batch of images in one pass. Each image has its own prompt, or none.

    The official decoder combines every image with every prompt, so it takes one image at a time. For each
    image this function computes what the official decoder computes with `multimask_output=False`.

    Args:
        embeddings: (B, C, e, e) float; C is 256 in every published SAM, B may be 0.
        points: (B, N, 2) float, (x, y) in pixels of the model's input frame; N may be 0.
        labels: (B, N) int, see `sam.point_labels`.

    Returns:
        Low-resolution logits (B, 1, 4e, 4e) of mask token 0, and its predicted IoU (B, 1).
    """
    decoder = sam.mask_decoder
    batch, channels, height, width = embeddings.shape
    with torch.autocast(embeddings.device.type, enabled=False):
        # Low precision would move prompts: a position in bfloat16 is off by about 1 of 1024 pixels.
        prompt_tokens = embed_prompts(sam, points, labels)
        src_pe = sam.prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2)
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    output_tokens = output_tokens.expand(batch, -1, -1)
    tokens = torch.cat([output_tokens, prompt_tokens], dim=1)  # (B, 5 + N, C)
    present = torch.cat([labels.new_ones(output_tokens.shape[:2]), labels != ABSENT], dim=1).bool()

    src = embeddings + sam.prompt_encoder.no_mask_embed.weight.view(1, channels, 1, 1)
    if torch.is_autocast_enabled(src.device.type):  # or every operation would cast the image again
        src = src.to(torch.get_autocast_dtype(src.device.type))
    # One memory layout for all embeddings: the last bits of a matrix product depend on the layout.
    src = src.flatten(2).transpose(1, 2).contiguous()  # (B, e * e, C)
    tokens, src = _two_way_transformer(decoder.transformer, src, src_pe.to(src.dtype), tokens, present)

    weights = decoder.output_hypernetworks_mlps[0](tokens[:, 1])  # (B, C / 8)
    logits = _upscaled_logits(decoder, src, weights).view(batch, height, width, 2, 2, 2, 2)
    logits = logits.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, 1, 4 * height, 4 * width)
    iou_pred = decoder.iou_prediction_head(tokens[:, 0])[:, :1]
    return logits, iou_pred


def _upscaled_logits(decoder: MaskDecoder, src: Tensor, weights: Tensor) -> Tensor:
    """The product of each upscaled pixel with the weights of its image, with the channels last throughout.

    Args:
        src: (B, e * e, C) float, the updated image embedding.
        weights: (B, C / 8) float, from the hypernetwork.

    Returns:
        Logits (B, 4 * e * e, 4). Each pixel of `src` becomes 2 x 2, and each of those 2 x 2 again.
    """
    first, norm, activation, second, _ = decoder.output_upscaling
    x = _double(first, src)  # (B, e * e, 4, C / 4)
    x = activation(layer_norm(norm, x))
    x = activation(_double(second, x.flatten(1, 2)))  # (B, 4 * e * e, 4, C / 8)
    # Four columns, one for each of the last 2 x 2 pixels: matrix products are faster than with vectors. On
    # CUDA, the gradient of a batched matrix-vector product would be a kernel that PyTorch 2.14 compiles at
    # run time, which fails without a C compiler.
    columns = weights[:, None, :, None] * torch.eye(4, device=weights.device)[:, None]  # (B, 4, C / 8, 4)
    return x.flatten(2) @ columns.flatten(1, 2)


def _double(convolution: nn.ConvTranspose2d, pixels: Tensor) -> Tensor:
    """A transposed convolution with kernel and stride 2: pixels (B, P, C) become (B, P, 4, C').

    Its outputs do not overlap, so it is one matrix product. The 2 x 2 new pixels are in row-major order.
    """
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (4 * C', C)
    assert convolution.bias is not None
    return F.linear(pixels, weight, convolution.bias.repeat(4)).unflatten(-1, (4, -1))


def embed_prompts(sam: Sam, points: Tensor, labels: Tensor) -> Tensor:
    """Prompt tokens (B, N, C) as the official prompt encoder computes them.

    `decode` describes `points` (B, N, 2) and `labels` (B, N).
    """
    encoder = sam.prompt_encoder
    tokens = encoder.pe_layer.forward_with_coords(points + 0.5, encoder.input_image_size)
    tokens = tokens * (labels >= min(POSITION_LABELS))[..., None]
    tokens = tokens + encoder.not_a_point_embed.weight * (labels == NOT_A_POINT)[..., None]
    for label, embedding in zip(POSITION_LABELS, encoder.point_embeddings, strict=True):
        tokens = tokens + embedding.weight * (labels == label)[..., None]
    return tokens


def _two_way_transformer(
    transformer: TwoWayTransformer, src: Tensor, src_pe: Tensor, point_tokens: Tensor, present: Tensor
) -> tuple[Tensor, Tensor]:
    """`TwoWayTransformer.forward` with a mask: nothing attends to tokens that are not `present`.

    Args:
        src: (B, e * e, C) float, the image embedding as a sequence.
        src_pe: (1, e * e, C) float, its positional encoding.
        point_tokens: (B, T, C) float, output tokens and prompt tokens.
        present: (B, T) bool.

    Returns:
        The updated tokens (B, T, C) and the updated image embedding (B, e * e, C).
    """
    tokens = point_tokens
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            tokens = _attend(layer.self_attn, tokens, tokens, present)
        else:
            tokens = tokens + _attend(layer.self_attn, tokens + point_tokens, tokens, present)
        tokens = layer.norm1(tokens)
        key = src + src_pe
        tokens = tokens + _attend_to_image(layer.cross_attn_token_to_image, tokens + point_tokens, key, src)
        tokens = layer.norm2(tokens)
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        src = src + _attend_from_image(
            layer.cross_attn_image_to_token, key, tokens + point_tokens, tokens, present
        )
        src = layer_norm(layer.norm4, src).to(src.dtype)
    attention = transformer.final_attn_token_to_image
    tokens = tokens + _attend_to_image(attention, tokens + point_tokens, src + src_pe, src)
    return transformer.norm_final_attn(tokens), src


def _attend(attention: Attention, query: Tensor, value: Tensor, present: Tensor) -> Tensor:
    """The official attention layer from tokens (B, T, C) to those of them that are `present` (B, T).

    There are about five tokens. Plain matrix products are then faster than the fused kernel.
    """
    q, k = _split_heads(attention, attention.q_proj(query)), _split_heads(attention, attention.k_proj(query))
    v = _split_heads(attention, attention.v_proj(value))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, heads, T, T)
    probs = scores.masked_fill(~present[:, None, None, :], -torch.inf).softmax(dim=-1)
    return attention.out_proj((probs.to(v.dtype) @ v).transpose(1, 2).flatten(2))


# The attention layers between T tokens and P pixels do not project the pixels, as the official layer does,
# but the tokens: q (W k) = (q W) k. T is about 5 and P is 4096, so this takes a third of the arithmetic, and
# no tensor of all pixels is split into heads.


def _attend_to_image(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The official attention layer from tokens `query` (B, T, C) to pixels `key`, `value` (B, P, C)."""
    heads, values = attention.num_heads, attention.v_proj
    q = _split_heads(attention, attention.q_proj(query))
    probs = _scores(q, attention.k_proj, key).softmax(dim=-1)
    means = (probs.flatten(1, 2) @ value).unflatten(1, (heads, -1))  # (B, heads, T, C)
    out = means @ values.weight.unflatten(0, (heads, -1)).transpose(1, 2)  # (B, heads, T, d)
    return attention.out_proj(out.transpose(1, 2).flatten(2) + values.bias)  # probabilities add up to 1


def _attend_from_image(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, present: Tensor
) -> Tensor:
    """The official attention layer from pixels (B, P, C) to tokens (B, T, C) that are `present` (B, T)."""
    heads, output = attention.num_heads, attention.out_proj
    k, v = (
        _split_heads(attention, projection(x))
        for projection, x in ((attention.k_proj, key), (attention.v_proj, value))
    )
    scores = _scores(k, attention.q_proj, query)
    probs = scores.masked_fill(~present[:, None, :, None], -torch.inf).softmax(dim=2)
    # The probabilities of each head add up to 1, so a part of the bias in each value gives all of it.
    values = v @ output.weight.T.unflatten(0, (heads, -1)) + output.bias / heads  # (B, heads, T, C)
    return probs.flatten(1, 2).transpose(1, 2) @ values.flatten(1, 2)


def _scores(vectors: Tensor, projection: nn.Linear, pixels: Tensor) -> Tensor:
    """Scaled products (B, heads, T, P) of vectors (B, heads, T, d) with the projected pixels (B, P, C)."""
    heads, n_tokens, head_dim = vectors.shape[1:]
    vectors = vectors * head_dim**-0.5
    weight, bias = (x.unflatten(0, (heads, head_dim)) for x in (projection.weight, projection.bias))
    offset = (vectors * bias[:, None]).sum(dim=-1)[..., None]  # (B, heads, T, 1)
    # With the pixels as rows, their gradient has their memory layout: other gradients are added to it.
    scores = pixels @ (vectors @ weight).flatten(1, 2).transpose(1, 2)  # (B, P, heads * T)
    return scores.transpose(1, 2).unflatten(1, (heads, n_tokens)) + offset


def _split_heads(attention: Attention, x: Tensor) -> Tensor:
    """(B, T, heads * d) to (B, heads, T, d)."""
    return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def upscale(
    sam: Sam, low_res_logits: Tensor, size: tuple[int, int], original_size: tuple[int, int]
) -> Tensor:
    """SAM's own upscaling to the original resolution, with the padding cut off.

    Args:
        low_res_logits: (B, 1, 4e, 4e) float, from `decode`.
        size: (h, w) of the image in the model's input frame.
        original_size: (h, w) of the image itself.

    Returns:
        Logits (B, 1, *original_size).
    """
    return sam.postprocess_masks(low_res_logits, size, original_size)
