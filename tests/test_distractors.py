"""Things that are no cables: where they are, what they leave alone."""

import numpy as np
import pytest
from conftest import rng

from imaging import distractors

NOISE = rng(9).integers(150, 256, (60, 90, 3)).astype(np.uint8)


def test_distractors_are_put_on_a_copy():
    image = np.full((60, 90, 3), 77, np.uint8)
    image.flags.writeable = False
    changed = distractors.add_distractors(image, NOISE, rng(1))
    assert changed.shape == image.shape and changed.dtype == np.uint8
    assert 0.01 < np.mean((changed != image).any(axis=2)) < 1
    assert (distractors.add_distractors(image, NOISE, rng(1)) == changed).all()


@pytest.mark.parametrize("draw", distractors.DRAWN)
def test_drawn_things_cover_a_part_of_the_image(draw):
    shares = []
    for seed in range(20):
        image = np.full((60, 90, 3), 128, np.uint8)
        draw(image, rng(seed))
        shares.append((image != 128).any(axis=2).mean())
    assert np.mean(np.array(shares) > 0) > 0.6  # some fall out of the frame
    assert 0.01 < np.mean(shares) < 0.6


def test_a_patch_is_of_the_other_photo_and_its_mask_says_where():
    covered = []
    for seed in range(30):
        image = np.zeros((60, 90, 3), np.uint8)
        alpha = distractors.put_patch(image, NOISE, rng(seed))
        assert alpha.shape == (60, 90) and alpha.min() >= 0 and alpha.max() <= 1
        assert (image[alpha == 0] == 0).all()
        assert (image[alpha == 1] >= 0.5 * 150 - 1).all()
        covered.append((alpha == 1).mean())
    assert 0.02 < np.mean(covered) < 0.4


def test_profiles_are_gray_or_colored_and_have_faces():
    profiles = [distractors.draw_profile(rng(seed)).astype(int) for seed in range(60)]
    colored = np.array([np.ptp(profile.mean(axis=0)) > 40 for profile in profiles])
    assert 0.05 < colored.mean() < 0.4
    assert np.mean([np.abs(np.diff(profile[:, 0])).max() > 8 for profile in profiles]) > 0.5
