"""Rendered strands: exact masks, what covers what, light and shadow."""

import cv2
import numpy as np
import pytest

from tools.cable_rendering import Light, Look, Strand, render

SIZE = (60, 80)
BACKGROUND = np.array([0.1, 0.5, 0.9])
PLAIN = Look(np.array([0.8, 0.2, 0.2]), limb=0.0, grain=0.0)
NO_LIGHT = Light(np.array([1.0, 0.0]), side=0.0, shadow=0.0)


def draw(*strands, light=NO_LIGHT):
    return render(strands, SIZE, BACKGROUND, light, np.zeros((256, 256), np.float32))


def line(start, stop, radius, height=0.0, look=PLAIN, is_cable=True):
    return Strand(np.linspace(start, stop, 50), radius, height, look, is_cable)


def distance_to_line(start, stop):
    """Distance of every pixel center from an endless line."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    direction = np.subtract(stop, start) / np.hypot(*np.subtract(stop, start))
    return np.abs((x - start[0]) * direction[1] - (y - start[1]) * direction[0])


def test_a_strand_along_the_pixels_has_exactly_their_mask():
    image, mask = draw(line((10, 20), (70, 20), 3))
    expected = np.zeros(SIZE, bool)
    expected[17:23, 10:70] = True
    assert (mask == expected).all()
    assert (image[expected] == [204, 51, 51]).all()
    assert (image[~expected] == [26, 128, 230]).all()


@pytest.mark.parametrize("radius", [1.5, 2.2, 7.3])
@pytest.mark.parametrize("stop", [(95, 31), (60, 90), (93, 77)])
def test_the_mask_of_a_slanted_strand_is_exact_to_a_fifth_of_a_pixel(radius, stop):
    start = (-11, -7)
    _, mask = draw(line(start, stop, radius))
    distance = distance_to_line(start, stop)
    assert mask[distance < radius - 0.2].all()
    assert not mask[distance > radius + 0.2].any()
    assert mask.sum() == pytest.approx((distance < radius).sum(), rel=0.03)


def test_a_tight_bend_has_no_holes():
    angle = np.linspace(0, 1.6 * np.pi, 60)
    ring = np.array([40, 30]) + 14 * np.column_stack([np.cos(angle), np.sin(angle)])
    _, mask = draw(Strand(ring, 11.0, 0.0, PLAIN))
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    from_center = np.hypot(x - 40, y - 30)
    turned = np.arctan2(y - 30, x - 40) % (2 * np.pi)
    drawn = (turned > 0.1 * np.pi) & (turned < 1.5 * np.pi) & (np.abs(from_center - 14) < 10.5)
    assert drawn.sum() > 1000
    assert mask[drawn].all()


def test_the_higher_strand_covers_and_only_cables_are_in_the_mask():
    low = line((5, 30), (75, 30), 5, height=0.0)
    blue = Look(np.array([0.0, 0.0, 1.0]), limb=0.0, grain=0.0)
    high = line((40, 5), (40, 55), 4, height=1.0, look=blue)
    for strands in ((low, high), (high, low)):
        image, mask = draw(*strands)
        assert (image[30, 40] == [0, 0, 255]).all() and (image[30, 20] == [204, 51, 51]).all()
        assert mask[30, 40] and mask[10, 40]
    plug = line((40, 5), (40, 55), 4, height=1.0, look=blue, is_cable=False)
    image, mask = draw(low, plug)
    assert (image[30, 40] == [0, 0, 255]).all()
    assert mask[30, 30] and not mask[:, 37:43].any()


def test_a_crossing_casts_a_shadow_on_cables_but_not_on_the_background():
    low, high = line((5, 30), (75, 30), 8, height=0.0), line((40, 2), (40, 58), 6, height=1.0)
    light = Light(np.array([1.0, 0.0]), side=0.0, shadow=0.5)
    image, mask = draw(low, high, light=light)
    plain, plain_mask = draw(low, high)
    darker = (image.astype(int) < plain).any(axis=-1)
    assert (mask == plain_mask).all()
    assert darker[30, 32] and darker[30, 46] and not darker[30, 40] and not darker[30, 15]
    assert not darker[~mask].any()


def test_a_coil_casts_a_shadow_on_itself_but_a_bend_does_not():
    angle = np.linspace(0, 2 * np.pi, 100)
    loop = np.array([40, 30]) + 20 * np.column_stack([np.cos(angle), np.sin(angle)])
    light = Light(np.array([1.0, 0.0]), side=0.0, shadow=0.5)
    open_ring = Strand(loop[:80], 4.0, 0.0, PLAIN)
    assert (draw(open_ring, light=light)[0] == draw(open_ring)[0]).all()
    end = np.linspace(loop[-1], loop[-1] + (0, 25), 20)
    start = np.linspace(loop[0] + (-25, 10), loop[0], 20)
    crossed = Strand(np.concatenate([start, loop, end]), 4.0, 0.0, PLAIN)
    assert (draw(crossed, light=light)[0] != draw(crossed)[0]).any()


def test_brightness_falls_toward_the_edge_by_its_formula():
    look = Look(np.array([0.8, 0.8, 0.8]), limb=0.5, limb_power=2.0, grain=0.0)
    image, _ = draw(line((5, 30), (75, 30), 15, look=look))
    across = np.abs(np.arange(16, 44) + 0.5 - 30) / 15
    expected = 255 * 0.8 * (1 - 0.5 * across**2)
    assert np.abs(image[16:44, 40, 0] - expected).max() < 4


@pytest.mark.parametrize(("direction", "bright", "dark"), [((0, -1), 22, 38), ((0, 1), 38, 22)])
def test_the_side_toward_the_light_is_brighter(direction, bright, dark):
    light = Light(np.array(direction, float), side=0.4, shadow=0.0)
    for start, stop in (((5, 30), (75, 30)), ((75, 30), (5, 30))):  # whatever the direction of the curve
        image, _ = draw(line(start, stop, 15), light=light)
        assert image[bright, 40, 0] > image[dark, 40, 0] + 40


def test_stripes_and_weaves_change_the_color_but_not_the_mask():
    stripe = Look(PLAIN.color, second_color=np.array([0.0, 0.9, 0.0]), grain=0.0)
    braid = Look(PLAIN.color, second_color=np.array([0.0, 0.9, 0.0]), grain=0.0, weave="braid")
    masks = []
    for look in (PLAIN, stripe, braid):
        image, mask = draw(line((5, 30), (75, 30), 10, look=look))
        green = image[..., 1] > image[..., 0]
        masks.append(mask)
        assert green[mask].any() == (look is not PLAIN)
    assert (masks[0] == masks[1]).all() and (masks[0] == masks[2]).all()


def test_the_same_strands_give_the_same_image():
    strand = line((5, 30), (75, 38), 6)
    first, second = draw(strand), draw(strand)
    assert (first[0] == second[0]).all() and (first[1] == second[1]).all()
    assert cv2.countNonZero(first[1].astype(np.uint8)) > 500
