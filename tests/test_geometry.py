"""Sizes as SamPredictor has them; what a model gets."""

import numpy as np
import pytest
import torch
from conftest import rng
from segment_anything.utils.transforms import ResizeLongestSide

from imaging import geometry
from imaging.geometry import InputSpec
from sam import encoder

SPEC = InputSpec(img_size=64, mask_grid=32)


@pytest.mark.parametrize("size", [(480, 640), (641, 333), (17, 1000), (64, 64)])
def test_sizes_and_pixels_are_those_of_sam_predictor(size):
    official = ResizeLongestSide(64)
    fitted = geometry.fit_size(size, 64)
    assert fitted == official.get_preprocess_shape(*size, 64)
    image = rng().integers(0, 255, (*size, 3)).astype(np.uint8)
    assert (geometry.resize_image(image, fitted) == official.apply_image(image)).all()


def test_a_side_never_shrinks_to_nothing():
    assert geometry.fit_size((1000, 3), 64) == (64, 1)
    assert geometry.fit_size((3, 10_000), 64) == (1, 64)


def test_thin_masks_survive_being_resized():
    mask = np.zeros((960, 1280), np.float32)
    mask[::97] = 1.0  # one pixel wide, a twentieth of a target pixel
    small = geometry.resize_mask(mask, (48, 64))
    assert small.mean() == pytest.approx(mask.mean(), rel=1e-5)
    assert (small.max(axis=1) > 0).sum() == 10


def test_model_input_pads_bottom_right_and_averages_the_target():
    mask = np.zeros((32, 64), np.float32)
    mask[8, :] = 1.0
    image = np.full((32, 64, 3), 9, np.uint8)
    sample = geometry.to_model_input(image, mask, SPEC)
    assert sample["image"].shape == (64, 64, 3) and sample["image"].dtype == torch.uint8
    assert sample["size"].tolist() == [32, 64]
    assert (sample["image"][:32] == 9).all() and (sample["image"][32:] == 0).all()
    assert (sample["target"][0, 4] == 128).all()  # half of each 2 x 2 cell
    assert sample["target"].dtype == torch.uint8 and sample["target"].int().sum() == 128 * 32
    valid = encoder.valid_pixels(sample["size"][None], SPEC.mask_grid, SPEC.mask_grid / SPEC.img_size)
    assert valid[0, 0].sum() == 16 * 32 and valid[0, 0, :16].all()


def test_a_grid_finer_than_the_input_has_a_target_of_its_own():
    mask = np.zeros((64, 128), np.float32)
    mask[9, :] = 1.0  # thinner than a pixel of the input
    sample = geometry.to_model_input(np.zeros((64, 128, 3), np.uint8), mask, InputSpec(64, 128))
    assert sample["image"].shape == (64, 64, 3) and sample["size"].tolist() == [32, 64]
    assert (sample["target"][0, 9] == 255).all() and sample["target"].int().sum() == 255 * 128


def test_model_input_is_never_a_view_of_a_cached_array():
    image = np.zeros((64, 64, 3), np.uint8)  # square and of the model's size: nothing to resize or pad
    image.flags.writeable = False
    sample = geometry.to_model_input(image, np.zeros((64, 64), np.float32), SPEC)
    assert not np.shares_memory(sample["image"].numpy(), image)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (20, 70), (49, 99)])
def test_a_box_contains_what_is_touched_and_its_margin(row, column):
    mask = np.zeros((50, 100), np.uint8)
    mask[row, column] = 1
    rows, columns = geometry.touched_box(mask, margin=5)
    inside = np.zeros(mask.shape, bool)
    inside[rows, columns] = True
    expected = np.zeros_like(inside)
    expected[max(row - 5, 0) : row + 6, max(column - 5, 0) : column + 6] = True
    assert (inside == expected).all()
    empty = geometry.touched_box(np.zeros((50, 100), np.uint8))
    assert mask[empty].size > 0
