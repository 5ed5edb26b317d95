"""Tiles without seams, prompts as SamPredictor takes them."""

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

import inference
from imaging.prompts import NO_PROMPT, Prompt
from inference import LoadedSam, predict_logits, predict_logits_tiled


def by_pixel(images, prompts):
    """A model that sees pixels one by one."""
    for image in images:
        yield image.mean(axis=2, dtype=np.float32) - 100


@pytest.mark.parametrize("size", [(300, 500), (64, 64), (40, 500), (65, 30)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_tiles_give_what_the_whole_gives(size, batch_size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    seen = []

    def find(images, prompts):
        seen.extend(picture.shape for picture in images)
        assert len(images) == len(prompts) <= batch_size
        return by_pixel(images, prompts)

    tiled = predict_logits_tiled(find, image, tile_size=64, batch_size=batch_size)
    (whole,) = by_pixel([image], [NO_PROMPT])
    np.testing.assert_allclose(tiled, whole, atol=1e-3)
    assert max(max(shape) for shape in seen) <= 64


def test_tiles_that_disagree_leave_no_seam():
    answers = iter(np.random.default_rng(1).uniform(-5, 5, 1000))

    def find(images, prompts):
        return [np.full(image.shape[:2], next(answers), np.float32) for image in images]

    tiled = predict_logits_tiled(find, np.zeros((300, 420, 3), np.uint8), tile_size=64, batch_size=4)
    steps = max(np.abs(np.diff(tiled, axis=axis)).max() for axis in (0, 1))
    assert np.ptp(tiled) > 5  # they do disagree
    assert steps < 1.5 * 10 / (inference.TILE_OVERLAP * 64)  # no more than the blending's slope


def test_tiles_cover_everything_and_overlap():
    for length in (64, 65, 100, 113, 1000):
        starts = inference._tile_starts(length, 64)
        assert starts[0] == 0 and starts[-1] == length - 64
        assert np.diff(starts).max(initial=0) <= 0.75 * 64 + 1


@torch.no_grad()
def test_prompts_are_those_of_sam_predictor(tiny_weights, tiny_sam):
    image = np.random.default_rng(0).integers(0, 256, (48, 90, 3), dtype=np.uint8)
    points, box = (
        np.array([[10.0, 20.0], [70.0, 30.0]], np.float32),
        np.array([5.0, 6.0, 60.0, 40.0], np.float32),
    )
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(image)
    given = {"point_coords": points, "point_labels": np.array([1, 0])}
    official_points = predictor.predict(**given, multimask_output=False, return_logits=True)[0][0]
    official_box = predictor.predict(box=box, multimask_output=False, return_logits=True)[0][0]
    with_points = Prompt(np.vstack([points, [[0, 0]]]).astype(np.float32), np.array([1, 0, -1]))
    with_box = Prompt(box.reshape(2, 2), np.array([2, 3]))
    prompts = [(with_points,), (with_box,), (with_points, with_box), NO_PROMPT]
    found = list(predict_logits(LoadedSam(tiny_sam, "tiny", None), [image] * 4, prompts))
    np.testing.assert_allclose(found[0], official_points, atol=1e-4)
    np.testing.assert_allclose(found[1], official_box, atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-3 and np.abs(found[0] - found[3]).max() > 1e-3
    both = np.maximum(found[0], found[1])  # of the low resolution; upscaled that is a little more
    assert (found[2] >= both - 1e-5).all()
    assert np.abs(found[2] - both).mean() < 0.1 * np.abs(found[0] - found[1]).mean()
    assert np.abs(found[2] - found[0]).max() > 1e-3


def test_prompts_in_chunks_give_the_same_logits(tiny_weights, tiny_sam):
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (48, 90, 3), dtype=np.uint8) for _ in range(2)]
    boxes = random.uniform(0, 40, (9, 2, 2)).astype(np.float32)
    prompts = [Prompt(box, np.array([2, 3])) for box in boxes]
    shares = [prompts[:7], prompts[7:]]
    n_decoded = []

    class Recorded(LoadedSam):
        def decode(self, embeddings, points, labels):
            n_decoded.append(len(points))
            return super().decode(embeddings, points, labels)

    net = Recorded(tiny_sam, "tiny", None)
    together = list(predict_logits(net, images, shares))
    in_chunks = list(predict_logits(net, images, shares, prompt_batch_size=4))
    assert n_decoded == [9, 4, 4, 1]
    np.testing.assert_allclose(in_chunks, together, atol=1e-5)
