"""Masks: the two values, and what is no mask. Files as other programs write them: test_foreign_masks.py."""

import cv2
import numpy as np
import pytest
from conftest import draw_cable, rng
from PIL import Image

from imaging import masks
from imaging.files import FileError


@pytest.mark.parametrize("top", [255, 1, 3, 128])
def test_png_mask_is_above_half_of_its_maximum(tmp_path, top):
    mask = draw_cable(rng(), (40, 50), 5)
    Image.fromarray(mask.astype(np.uint8) * top).save(tmp_path / "m.png")
    assert (masks.read_mask(tmp_path / "m.png") == mask).all()


def test_a_jpeg_mask_is_above_127_and_its_noise_stays_out(tmp_path):
    mask = draw_cable(rng(), (40, 50), 7)
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "n.jpg", quality=90)
    assert (masks.read_mask(tmp_path / "n.jpg") != mask).mean() < 0.01


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA"])
def test_mask_of_any_8_bit_mode(tmp_path, mode):
    mask = draw_cable(rng(), (40, 50), 5)
    red = np.zeros((40, 50, 3), np.uint8)
    red[mask] = (255, 0, 0) if mode in ("P", "RGB", "RGBA") else 255
    Image.fromarray(red).convert(mode).save(tmp_path / "m.png")
    assert (masks.read_mask(tmp_path / "m.png") == mask).all()


def test_all_background_is_a_legal_mask(tmp_path):
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "m.png")
    assert not masks.read_mask(tmp_path / "m.png").any()


def test_smooth_edges_are_legal_in_a_mask(tmp_path):
    smooth = cv2.resize(
        draw_cable(rng(), (400, 500), 50).astype(np.uint8) * 255, (50, 40), interpolation=cv2.INTER_AREA
    )
    Image.fromarray(smooth).save(tmp_path / "m.png")
    assert (masks.read_mask(tmp_path / "m.png") == (smooth > 127.5)).all()


PHOTO = rng().integers(0, 255, (40, 50)).astype(np.uint8)
LABEL_MAP = np.repeat(np.arange(4), 10)[:, None].repeat(50, axis=1).astype(np.uint8)
PROBABILITIES = np.linspace(0, 255, 50)[None].repeat(40, axis=0).astype(np.uint8)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (PHOTO, "is it a photo"),
        (PROBABILITIES, "is it a photo, or are these probabilities"),
        (LABEL_MAP, "but labels, with the values 0, 1, 2, 3; .*mask_values"),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_file_that_is_not_a_binary_mask_is_refused(tmp_path, values, reason, dtype):
    Image.fromarray(values.astype(dtype)).save(tmp_path / "m.png")
    with pytest.raises(FileError, match=rf"m\.png: not a binary mask.*{reason}"):
        masks.read_mask(tmp_path / "m.png")
