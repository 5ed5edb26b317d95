"""Drawing: what is changed, and where."""

import numpy as np
import pytest
from skimage.color import rgb2lab

from imaging import visualize
from imaging.centerlines import Cable, Crossing
from sam.point_labels import ABSENT, BOX_CORNER_1, BOX_CORNER_2, FOREGROUND_POINT, NOT_A_POINT


def test_a_panel_shows_what_is_found_missed_and_wrong_beside_the_image():
    image = np.full((4, 6, 3), 100, np.uint8)
    truth, prediction = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    truth[1, :2] = prediction[1, 1:3] = True  # missed, found, wrong
    shown = visualize.panel(image, truth, prediction)
    assert shown.shape == (4, 12, 3)
    assert (shown[:, :6] == image).all() and (image == 100).all()
    compared = shown[:, 6:].astype(int)
    for column, color in enumerate((visualize.MISSED_COLOR, visualize.FOUND_COLOR, visualize.WRONG_COLOR)):
        expected = 0.2 * 45 + 0.8 * np.array(color)
        np.testing.assert_allclose(compared[1, column], expected, atol=1)
    assert (compared[~(truth | prediction)] == 45).all()  # darkened


def test_a_prediction_alone_is_found():
    mask = np.zeros((4, 6), bool)
    mask[2, 3] = True
    drawn = visualize.overlay(np.full((4, 6, 3), (0, 200, 0), np.uint8), mask)
    assert np.abs(drawn[2, 3].astype(int) - visualize.FOUND_COLOR).max() < 45
    assert (drawn[~mask] == drawn[0, 0]).all() and len(set(drawn[0, 0].tolist())) == 1  # green became gray


def test_thin_cables_are_drawn_wider_on_large_images_but_nothing_is_overwritten():
    image = np.zeros((1600, 1600, 3), np.uint8)
    truth, prediction = np.zeros((1600, 1600), bool), np.zeros((1600, 1600), bool)
    truth[400], prediction[401], prediction[800] = True, True, True
    drawn = visualize.overlay(image, prediction, truth)
    rows = drawn[:, 800].any(axis=1)
    assert np.flatnonzero(rows).tolist() == [*range(398, 404), *range(798, 803)]
    blue, orange = drawn[400, 800].astype(int), drawn[401, 800].astype(int)
    assert blue[2] > blue[0] + 100 and orange[0] > orange[2] + 100
    small = visualize.overlay(image[:300, :300], prediction[:300, :300], truth[:300, :300])
    assert not small.any()


# Machado, Oliveira and Fernandes (2009): linear RGB as seen without one kind of cones.
VISION = {
    "normal": np.eye(3),
    "without red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "without green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "without blue": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab_as_seen(color, matrix):
    """CIE Lab of an sRGB color."""
    srgb = np.array(color) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(matrix) @ linear, 0, 1)
    seen = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    return rgb2lab(seen)


@pytest.mark.parametrize("vision", VISION)
def test_colors_stay_apart_with_every_color_vision_deficiency_and_on_every_image(vision):
    white = visualize.darkened(np.full((1, 1, 3), 255, np.uint8))[0, 0]
    colors = [color for _, color in visualize.LEGEND]
    seen = [lab_as_seen(color, VISION[vision]) for color in (*colors, white, (0, 0, 0))]
    distances = [np.linalg.norm(seen[i] - seen[j]) for i in range(len(colors)) for j in range(i)]
    assert min(distances) > 35
    to_gray = [np.linalg.norm(color - gray) for color in seen[:3] for gray in seen[3:]]
    assert min(to_gray) > 25


def test_names_are_written_on_images_and_above_them():
    image = np.full((90, 200, 3), 77, np.uint8)
    labeled = visualize.label(image, "IoU 0.5  \udcff\u65e5.jpg", with_legend=True)
    assert labeled.shape == image.shape and (image == 77).all()
    assert (labeled[40:] == 77).all() and (labeled[:10, :60] != 77).all()
    pixels = labeled[:15].reshape(-1, 3).astype(int)
    for _, color in [*visualize.LEGEND, ("", (255, 255, 255))]:
        assert np.abs(pixels - color).sum(axis=1).min() < 60
    captioned = visualize.caption(image, "x" * 99)
    assert captioned.shape[1] == 200 and (captioned[-90:] == image).all()
    assert 10 < len(captioned) - 90 < 25
    tiny = visualize.label(image[:5, :8], "a long name")
    assert tiny.shape == (5, 8, 3)


def test_prompts_are_drawn_where_they_are():
    image = np.zeros((50, 60, 3), np.uint8)
    points = np.array([[40, 10], [0, 0], [0, 0]], np.float32)
    drawn = visualize.draw_points(image, points, np.array([FOREGROUND_POINT, NOT_A_POINT, ABSENT]))
    rows, columns = np.nonzero(drawn.any(axis=2))
    assert (rows.mean(), columns.mean()) == (10, 40)
    corners = np.array([[5, 10], [50, 40]], np.float32)
    boxed = visualize.draw_points(image, corners, np.array([BOX_CORNER_1, BOX_CORNER_2])).any(axis=2)
    assert boxed[10, 20] and boxed[25, 50] and not boxed[25, 20]


def test_sheet_stacks_images_of_any_size():
    images = [np.zeros((10, 20, 3), np.uint8), np.full((30, 10, 3), 9, np.uint8)]
    stacked = visualize.sheet(images, width=100)
    assert stacked.shape == (50 + 300, 100, 3)
    assert (stacked[:50] == 0).all() and (stacked[50:] == 9).all()


def test_a_sheet_of_a_strip_is_at_most_four_times_as_tall_as_wide():
    strip, square = np.full((4000, 2, 3), 200, np.uint8), np.full((8, 8, 3), 100, np.uint8)
    stacked = visualize.sheet([strip, square], width=100)
    assert stacked.shape == (500, 100, 3)
    assert (
        (stacked[:400, 0] == 200).all() and (stacked[:400, 1:] == 20).all() and (stacked[400:] == 100).all()
    )


def test_a_contact_sheet_fills_its_rows():
    images = [np.full((10, 20, 3), value, np.uint8) for value in (1, 2, 3)]
    sheet = visualize.contact_sheet(images, columns=2, width=40)
    assert sheet.shape == (40, 80, 3)
    assert [sheet[10, 10, 0], sheet[10, 50, 0], sheet[30, 10, 0], sheet[30, 50, 0]] == [1, 2, 3, 0]


def test_shrink_keeps_thin_cables_of_a_mask():
    mask = np.zeros((300, 400), bool)
    mask[150] = True  # a third of a pixel when shrunk
    small = visualize.shrink(mask, 133)
    assert small.shape == (100, 133) and small.dtype == bool
    assert small.sum() == 133
    assert visualize.shrink(mask, 400) is mask


def test_each_cable_is_drawn_in_a_color_of_its_own_with_its_crossings():
    lines = np.array([[(10, 50), (150, 50)], [(10, 90), (150, 92)]], np.float32)
    widths = np.full(2, 5, np.float32)
    cables = [Cable(number, line, widths, False, ("free", "free")) for number, line in enumerate(lines, 1)]
    image = np.full((120, 160, 3), 100, np.uint8)
    drawn = visualize.draw_cables(image, cables, [Crossing((80.0, 50.0), (1, 2), 90.0)])
    assert (image == 100).all() and drawn.shape == image.shape
    assert tuple(drawn[50, 40]) == visualize.CABLE_COLORS[0]
    assert tuple(drawn[90, 40]) == visualize.CABLE_COLORS[1]
    assert tuple(drawn[70, 40]) == (60, 60, 60)  # darkened
    assert drawn[40:45, 80].min(axis=1).max() > 200  # the white circle around the crossing
    assert len(set(visualize.CABLE_COLORS)) == len(visualize.CABLE_COLORS)
