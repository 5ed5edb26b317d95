"""Batched decoding computes what SAM's own decoder computes for one image and one prompt at a time."""

import numpy as np
import pytest
import torch
from conftest import TINY_DIM, TINY_PATCH, TINY_SIZE
from segment_anything import SamPredictor

from sam import decoder, encoder
from sam.point_labels import (
    ABSENT,
    BACKGROUND_POINT,
    BOX_CORNER_1,
    BOX_CORNER_2,
    BOX_CORNERS,
    FOREGROUND_POINT,
    NOT_A_POINT,
)
from sam.trainable import freeze

NONE: list[int] = []
POINT = [FOREGROUND_POINT, NOT_A_POINT]
TWO_POINTS = [FOREGROUND_POINT, BACKGROUND_POINT, NOT_A_POINT]
BOX = [BOX_CORNER_1, BOX_CORNER_2]
POINT_AND_BOX = [FOREGROUND_POINT, BOX_CORNER_1, BOX_CORNER_2]
BATCHES = [[NONE] * 3, [POINT] * 3, [BOX] * 3, [NONE, POINT, TWO_POINTS, BOX, POINT_AND_BOX]]


def random_embeddings(batch):
    side = TINY_SIZE // TINY_PATCH
    return torch.randn(batch, TINY_DIM, side, side, generator=torch.manual_seed(0))


def pad_prompts(prompts, length):
    """Labels (B, length), padded with ABSENT, and random points (B, length, 2)."""
    labels = torch.tensor([labels + [ABSENT] * (length - len(labels)) for labels in prompts]).long()
    points = torch.rand(len(prompts), length, 2, generator=torch.manual_seed(1)) * TINY_SIZE
    return points, labels


def decode_officially(sam, embedding, points, labels):
    """Logits (1, 1, h, w) and predicted IoU (1, 1) of one image (1, C, e, e) by SAM's own modules."""
    clicks = (labels == FOREGROUND_POINT) | (labels == BACKGROUND_POINT)
    corners = torch.isin(labels, torch.tensor(BOX_CORNERS))
    sparse, dense = sam.prompt_encoder(
        points=(points[clicks][None], labels[clicks][None]) if clicks.any() else None,
        boxes=points[corners].reshape(1, 4) if corners.any() else None,
        masks=None,
    )
    return sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )


def record_input(module, inputs):
    module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))


def record_output(module, outputs):
    module.register_forward_hook(lambda module, args, output: outputs.append(output))


@torch.no_grad()
def test_positions_stay_in_float32_under_autocast(tiny_sam):
    points, labels = pad_prompts([TWO_POINTS, BOX], 3)
    tokens, encodings = [], []
    record_input(tiny_sam.mask_decoder.transformer.layers[0].self_attn.q_proj, tokens)
    record_output(tiny_sam.prompt_encoder.pe_layer, encodings)
    with torch.autocast("cpu", torch.bfloat16):
        decoder.decode(tiny_sam, random_embeddings(2), points, labels)
    assert torch.equal(tokens[0][:, -3:], decoder.embed_prompts(tiny_sam, points, labels))
    tiny_sam.prompt_encoder.get_dense_pe()
    in_low_precision, exact = encodings
    assert torch.equal(in_low_precision, exact)


def test_gradients_of_a_batch_are_those_of_the_official_decoder(tiny_sam):
    batch = [NONE, POINT, TWO_POINTS, BOX, POINT_AND_BOX]
    embeddings = random_embeddings(len(batch)).requires_grad_()
    points, labels = pad_prompts(batch, 3)
    inputs = [embeddings, *freeze(tiny_sam)]
    # Every pixel has a weight of its own, so that a gradient at a wrong place shows.
    weights = torch.randn(len(batch), 1, 32, 32, generator=torch.manual_seed(2))
    logits, iou = decoder.decode(tiny_sam, embeddings, points, labels)
    ours = torch.autograd.grad((logits * weights).sum() + iou.square().sum(), inputs)
    images = zip(embeddings.split(1), points, labels, strict=True)
    official = [decode_officially(tiny_sam, *image) for image in images]
    logits, iou = (torch.cat(outputs) for outputs in zip(*official, strict=True))
    expected = torch.autograd.grad((logits * weights).sum() + iou.square().sum(), inputs)
    for gradient, expected_gradient in zip(ours, expected, strict=True):
        scale = expected_gradient.abs().max().item()
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5 * max(scale, 1))
    assert all(gradient.any() for gradient in expected)


@pytest.mark.parametrize("batch", BATCHES, ids=["none", "point", "box", "mixed"])
@torch.no_grad()
def test_a_batch_equals_the_official_decoder_image_by_image(tiny_sam, batch):
    embeddings = random_embeddings(len(batch))
    points, labels = pad_prompts(batch, max(len(prompt) for prompt in batch))
    logits, iou = decoder.decode(tiny_sam, embeddings, points, labels)
    images = zip(embeddings.split(1), points, labels, strict=True)
    official = [decode_officially(tiny_sam, *image) for image in images]
    official_logits, official_iou = zip(*official, strict=True)
    torch.testing.assert_close(logits, torch.cat(official_logits))
    torch.testing.assert_close(iou, torch.cat(official_iou))
    assert logits.shape == (len(batch), 1, 32, 32) and iou.shape == (len(batch), 1)
    assert not torch.allclose(logits[0], logits[1])


@torch.no_grad()
def test_absent_points_change_nothing(tiny_sam):
    embeddings = random_embeddings(2)
    points, labels = pad_prompts([POINT, BOX], 5)
    padded = decoder.decode(tiny_sam, embeddings, points, labels)
    alone = decoder.decode(tiny_sam, embeddings, points[:, :2], labels[:, :2])
    torch.testing.assert_close(padded, alone)
    labels[:, 2] = FOREGROUND_POINT
    assert not torch.allclose(decoder.decode(tiny_sam, embeddings, points, labels)[0], alone[0])


@pytest.mark.parametrize("n_points", [0, 2])
def test_a_batch_of_no_images_has_empty_logits_and_zero_gradients(tiny_sam, n_points):
    embeddings = random_embeddings(1)[:0]
    points, labels = torch.zeros(0, n_points, 2), torch.zeros(0, n_points, dtype=torch.long)
    logits, iou = decoder.decode(tiny_sam, embeddings, points, labels)
    assert logits.shape == (0, 1, 32, 32) and iou.shape == (0, 1)
    (logits.sum() + iou.sum()).backward()
    gradients = [tiny_sam.mask_decoder.iou_token.weight.grad, tiny_sam.mask_decoder.mask_tokens.weight.grad]
    gradients += [p.grad for p in tiny_sam.mask_decoder.transformer.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@torch.no_grad()
def test_upscaled_logits_are_those_of_sam_predictor(tiny_sam, tiny_weights):
    image_u8 = np.random.default_rng(0).integers(0, 255, (90, 130, 3)).astype(np.uint8)
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(image_u8)
    official, _, _ = predictor.predict(multimask_output=False, return_logits=True)
    height, width = predictor.input_size
    images = torch.zeros(1, TINY_SIZE, TINY_SIZE, 3, dtype=torch.uint8)
    images[0, :height, :width] = torch.from_numpy(predictor.transform.apply_image(image_u8))
    embeddings = encoder.encode(tiny_sam, images, torch.tensor([[height, width]]), "tiny")
    logits, _ = decoder.decode(tiny_sam, embeddings, *pad_prompts([NONE], 0))
    ours = decoder.upscale(tiny_sam, logits, (height, width), (90, 130))
    torch.testing.assert_close(ours[0], torch.from_numpy(official))
