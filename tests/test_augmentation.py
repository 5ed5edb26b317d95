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


def test_cables_take_every_color():
    red = np.full((4, 4, 3), (200, 40, 40), np.uint8)
    recolored = np.stack([augmentation.recolor_cables(red, rng(seed))[0, 0] for seed in range(60)])
    assert set(recolored.argmax(axis=1)) == {0, 1, 2}
    assert np.ptp(recolored.max(axis=1).astype(int)) > 60


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


@pytest.mark.parametrize("draw", augmentation.CLUTTER_KINDS)
def test_clutter_of_every_kind_is_drawn_in_one_color_within_the_image(draw):
    changed = []
    for seed in range(20):
        layer = np.zeros((60, 90, 3), np.uint8)
        draw(layer, [200, 100, 50], rng(seed))
        drawn = layer.any(axis=2)
        changed.append(drawn.mean())
        strong = layer[layer[..., 0] > 150].astype(float)
        assert np.allclose(strong[:, 1] / strong[:, 0], 0.5, atol=0.02)
    assert np.mean(np.array(changed) > 0) > 0.7  # some of it falls out of the frame
    assert np.mean(changed) < 0.5


def test_clutter_is_drawn_on_a_copy():
    image = np.full((60, 90, 3), 77, np.uint8)
    image.flags.writeable = False
    cluttered = augmentation.add_clutter(image, rng(1))
    assert cluttered.shape == image.shape and cluttered.dtype == np.uint8
    assert 0.01 < np.mean((cluttered != image).any(axis=2)) < 1
    assert (augmentation.add_clutter(image, rng(1)) == cluttered).all()


def test_shadows_darken_beside_the_cable_alone():
    image = np.full((256, 256, 3), 200, np.uint8)
    cables = np.zeros((256, 256, 4), np.uint8)
    augmentation.cast_shadow(cables, image, rng())
    assert (image == 200).all()
    cables[100:110, :, 3] = 255
    augmentation.cast_shadow(cables, image, rng())
    assert image.min() < 170 and image.max() == 200
    assert (image[:80] == 200).all() and (image[130:] == 200).all()  # at most 5 px away, blurred by 4
