"""The look of pasted cables: colors of every kind, one light, shading across the cable."""

import cv2
import numpy as np
import pytest
from conftest import rng

from imaging import appearance
from imaging.appearance import Color, Light, Shading

NO_SHADING = Shading(drop=0.0, power=2.0, gloss=0.0, gloss_width=0.2)


def light(**changes):
    values = {"side": 0.0, "shadow": 0.0, "shadow_shift": 0.0, "shadow_blur": 1.0, "gain": np.ones(3)}
    return Light(**{"direction": np.array([1.0, 0.0]), **values, **changes})


def lab(pixels):
    return cv2.cvtColor(np.float32(pixels[None]) / 255, cv2.COLOR_RGB2LAB)[0]


def test_cables_are_black_gray_white_and_of_every_hue():
    red = np.tile(np.uint8([[200, 40, 40]]), (50, 1))
    drawn = [appearance.recolor(red, appearance.draw_color(rng(seed))) for seed in range(400)]
    mean = np.array([lab(pixels).mean(axis=0) for pixels in drawn])
    chroma = np.hypot(mean[:, 1], mean[:, 2])
    gray = chroma < 12
    assert 0.35 < gray.mean() < 0.55
    for low, high in ((0, 30), (30, 74), (74, 100)):
        assert ((mean[gray, 0] >= low) & (mean[gray, 0] < high)).mean() > 0.2
    hues = np.arctan2(mean[~gray, 2], mean[~gray, 1])
    assert (np.histogram(hues, 6, (-np.pi, np.pi))[0] > 10).all()


@pytest.mark.parametrize("lightness", [15.0, 50.0, 90.0])
def test_a_recolored_cable_has_the_lightness_and_keeps_its_shading(lightness):
    ramp = np.repeat(np.arange(80, 180, dtype=np.uint8)[:, None], 3, axis=1)
    recolored = appearance.recolor(ramp, Color(np.array([lightness, 0.0, 0.0]), 0.0, 0.0))
    result = lab(recolored)
    assert result[:, 0].mean() == pytest.approx(lightness, abs=5)
    assert (np.diff(result[:, 0]) >= -1e-3).all() and np.ptp(result[:, 0]) > 5
    assert np.abs(result[:, 1:]).max() < 1


def test_without_a_color_pixels_stay_as_they_are():
    pixels = rng().integers(0, 256, (40, 3)).astype(np.uint8)
    assert (appearance.recolor(pixels, None) == pixels).all()
    assert appearance.recolor(pixels[:0], Color(np.zeros(3), 0.0, 0.0)).shape == (0, 3)


def test_colors_of_several_cables_in_one_photo_stay_apart():
    two = np.repeat(np.uint8([[200, 30, 30], [30, 30, 200]]), 20, axis=0)
    turned = lab(appearance.recolor(two, Color(np.array([60.0, 10.0, 10.0]), 1.0, 0.5)))
    assert np.linalg.norm(turned[0, 1:] - turned[-1, 1:]) > 20


def test_the_edge_is_darker_than_the_center_line():
    colors = np.full((3, 3), 100, np.float32)
    across, normals = np.array([0, 0.5, 1], np.float32), np.tile(np.float32([[0, 1]]), (3, 1))
    shading = Shading(drop=0.5, power=2.0, gloss=0.0, gloss_width=0.2)
    assert appearance.shade(colors, across, normals, shading, light())[:, 0].tolist() == [100, 87.5, 50]
    assert (appearance.shade(colors, across, normals, NO_SHADING, light()) == 100).all()


def test_the_side_that_faces_the_light_is_brighter():
    colors, across = np.full((2, 3), 100, np.float32), np.ones(2, np.float32)
    normals = np.float32([[-1, 0], [1, 0]])  # light comes from the left
    shaded = appearance.shade(colors, across, normals, NO_SHADING, light(side=0.2))
    assert shaded[:, 0] == pytest.approx([120, 80])


def test_gloss_brightens_a_line_between_center_and_light():
    across = np.abs(np.linspace(-1, 1, 41, dtype=np.float32))
    normals = np.stack([np.sign(np.linspace(-1, 1, 41)), np.zeros(41)], axis=1).astype(np.float32)
    shading = Shading(drop=0.0, power=2.0, gloss=0.5, gloss_width=0.2)
    shaded = appearance.shade(np.full((41, 3), 100, np.float32), across, normals, shading, light())[:, 0]
    assert shaded.argmax() == 12  # 0.4 of the radius toward the light
    assert shaded.max() == pytest.approx(100 + 0.5 * 155, abs=1) and shaded[-1] == pytest.approx(100, abs=1)


def test_the_light_follows_the_scene():
    dark, bright = (np.full((40, 40, 3), value, np.uint8) for value in (10, 240))
    gains = [
        [appearance.draw_light(image, rng(s)).gain.mean() for s in range(30)] for image in (dark, bright)
    ]
    assert np.mean(gains[0]) < 0.85 and np.mean(gains[1]) > 1.05
    yellow = np.full((40, 40, 3), (200, 180, 60), np.uint8)
    gain = np.mean([appearance.draw_light(yellow, rng(s)).gain for s in range(30)], axis=0)
    assert gain[0] > gain[1] > gain[2]
    assert np.linalg.norm(appearance.draw_light(dark, rng()).direction) == pytest.approx(1)


def test_shadows_darken_beside_the_cable_alone():
    image = np.full((256, 256, 3), 200, np.uint8)
    alpha = np.zeros((256, 256), np.uint8)
    down = light(direction=np.array([0.0, 1.0]), shadow=0.5, shadow_shift=5.0, shadow_blur=2.0)
    appearance.cast_shadow(alpha, image, down)
    assert (image == 200).all()
    alpha[100:110] = 255
    appearance.cast_shadow(alpha, image, light())
    assert (image == 200).all()
    appearance.cast_shadow(alpha, image, down)
    assert 95 <= image.min() <= 105 and image.max() == 200
    assert (image[:95] == 200).all() and (image[125:] == 200).all()
    assert image[112, 0, 0] < 120 < image[101, 0, 0]  # it falls below the cable


@pytest.mark.parametrize("blur", [0.6, 1.7, 4.0])
def test_a_shadow_is_the_mask_moved_and_blurred(blur):
    alpha = np.zeros((300, 512), np.uint8)
    cv2.line(alpha, (200, 90), (420, 299), 255, 9, cv2.LINE_AA)  # leaves the image at the bottom
    slanted = light(direction=np.array([0.6, 0.8]), shadow=0.7, shadow_shift=2.3, shadow_blur=blur)
    image = rng().integers(0, 256, (300, 512, 3)).astype(np.uint8)
    moved = cv2.warpAffine(alpha, np.array([[1, 0, 4.6 * 0.6], [0, 1, 4.6 * 0.8]]), (512, 300))
    blurred = cv2.GaussianBlur(moved, (0, 0), 2 * blur)[..., None].astype(np.float32)
    expected = np.rint(image * (1 - 0.7 / 255 * blurred))
    appearance.cast_shadow(alpha, image, slanted)
    assert np.abs(image - expected).max() <= 1  # OpenCV blurs uint8 images with rounded weights
