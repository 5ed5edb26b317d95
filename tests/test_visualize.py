"""Drawing: what is changed, and where."""

import numpy as np

from imaging import visualize
from imaging.centerlines import Cable, Crossing
from sam.point_labels import ABSENT, BOX_CORNER_1, BOX_CORNER_2, FOREGROUND_POINT, NOT_A_POINT


def test_panel_tints_only_masked_pixels():
    image = np.full((4, 6, 3), 100, np.uint8)
    truth, prediction = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    truth[1, 2] = prediction[3, 5] = True
    shown = visualize.panel(image, truth, prediction)
    assert shown.shape == (4, 18, 3)
    changed = (shown != 100).any(axis=2)
    assert np.argwhere(changed).tolist() == [[1, 6 + 2], [3, 12 + 5]]
    assert (image == 100).all()


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
