"""Decoding: image embeddings and prompts to mask logits, one batch at a time."""

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from segment_anything.modeling.transformer import Attention, TwoWayTransformer
from torch import Tensor

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


# By device: the columns of the matrix product that computes logits. On other devices, there are 8.
LOGIT_COLUMNS = {"cpu": 1}


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
    # One memory layout for all embeddings: the last bits of a matrix product depend on the layout.
    src = src.flatten(2).transpose(1, 2).contiguous()  # (B, e * e, C)
    tokens, src = _two_way_transformer(decoder.transformer, src, src_pe, tokens, present)

    src = src.transpose(1, 2).unflatten(2, (height, width))  # channels last, like all that follows
    upscaled = decoder.output_upscaling(src).permute(0, 2, 3, 1)  # (B, 4e, 4e, C / 8)
    weights = decoder.output_hypernetworks_mlps[0](tokens[:, 1])  # (B, C / 8)
    logits = _dot_products(upscaled.flatten(1, 2), weights).view(batch, 1, *upscaled.shape[1:3])
    iou_pred = decoder.iou_prediction_head(tokens[:, 0])[:, :1]
    return logits, iou_pred


def _dot_products(pixels: Tensor, weights: Tensor) -> Tensor:
    """The product of each pixel (B, P, C) with the weights (B, C) of its image: (B, P).

    The gradient of a batched matrix-vector product is a batched outer product. For this, PyTorch 2.14
    compiles a kernel at run time on CUDA, which fails without a C compiler. On devices other than a CPU,
    columns of zeros turn it into a matrix product; tensor cores take a multiple of 8 columns.
    """
    n_zeros = LOGIT_COLUMNS.get(pixels.device.type, 8) - 1
    return (pixels @ F.pad(weights[:, :, None], (0, n_zeros)))[..., 0].contiguous()


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
    """The official attention layer with a bool mask (B, 1, 1, keys) of the keys that may be attended to.

    There are few scores, because one side has about five tokens. Plain matrix products are then faster
    than the fused kernel: they save a tenth of a training step on a CPU.
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
    """SAM's own upscaling to the original resolution, with the padding cut off.

    Args:
        low_res_logits: (B, 1, 4e, 4e) float, from `decode`.
        size: (h, w) of the image in the model's input frame.
        original_size: (h, w) of the image itself.

    Returns:
        Logits (B, 1, *original_size).
    """
    return sam.postprocess_masks(low_res_logits, size, original_size)
