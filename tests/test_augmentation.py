"""Random changes of images: what they change, and what they must leave alone."""

import numpy as np
import pytest
from conftest import draw_cable, rng

from imaging import augmentation


def test_flip_moves_image_and_mask_alike_and_copies_its_argument():
    mask = draw_cable(rng(1), (20, 30), 3).astype(np.uint8)
    image = np.repeat(mask[..., None], 4, axis=2)
    image.flags.writeable = False  # as it comes from the cache
    seen = set()
    for seed in range(40):
        flipped = augmentation.flip(image, rng(seed))
        assert (flipped[..., 0] == flipped[..., 3]).all()
        seen.add(flipped.tobytes())
        flipped[:] = 7
    assert len(seen) == 4
    assert (image[..., 0] == mask).all()


def test_camera_degradation_keeps_shape_and_range():
    image = rng().integers(0, 255, (30, 40, 3)).astype(np.uint8)
    results = [augmentation.camera_degradation(image, rng(seed)) for seed in range(30)]
    assert all(result.shape == image.shape and result.dtype == np.uint8 for result in results)
    assert len({result.tobytes() for result in results}) == 30
    dark = np.zeros((8, 8, 3), np.uint8)  # darkening black must not wrap around or fold back
    assert min(int(augmentation.camera_degradation(dark, rng(seed)).max()) for seed in range(10)) == 0


def test_noise_is_normal():
    z = augmentation.NORMAL_QUANTILES
    assert abs(z.mean()) < 1e-9 and z.std() == pytest.approx(1.0, abs=0.02)
    assert (np.abs(z) < 1).mean() == pytest.approx(0.683, abs=0.01)
