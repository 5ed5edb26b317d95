"""Centerlines: which pixels of a mask are one cable, where it runs and how wide it is."""

import json

import cv2
import numpy as np
import pytest
from scipy.spatial import cKDTree

from imaging.centerlines import cables_document, centerlines, find_crossings, instance_mask
from imaging.skeleton import distance_to_edge, find_branches

SIZE = (240, 320)


def draw(*lines, width=8):
    """The pixels nearer to polylines [(x, y), ...] than half the width."""
    pixels = np.argwhere(np.ones(SIZE, bool))[:, ::-1]
    nearest = np.full(len(pixels), np.inf)
    for line in lines:
        points = np.array(line, float)
        arcs = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
        at = np.arange(0, arcs[-1], 0.1)
        fine = np.column_stack([np.interp(at, arcs, points[:, 0]), np.interp(at, arcs, points[:, 1])])
        nearest = np.minimum(nearest, cKDTree(fine).query(pixels, distance_upper_bound=width)[0])
    return (nearest < width / 2).reshape(SIZE)


def through(center, angle, length=200):
    """A straight line through a point, at an angle in degrees."""
    half = length / 2 * np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    return [np.array(center) - half, np.array(center) + half]


def distance_to_line(points, line):
    """The distance of points (N, 2) to the straight line through two points."""
    (x1, y1), (x2, y2) = np.array(line, float)
    across = (points[:, 0] - x1) * (y2 - y1) - (points[:, 1] - y1) * (x2 - x1)
    return np.abs(across) / np.hypot(x2 - x1, y2 - y1)


# --- One cable ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4, 9, 20])
@pytest.mark.parametrize("angle", [0, 30, 90])
def test_a_straight_cable(width, angle):
    line = through((160.25, 120.25), angle, 180)
    (cable,) = centerlines(draw(line, width=width))
    assert cable.id == 1 and not cable.closed and cable.ends == ("free", "free")
    assert distance_to_line(cable.points, line).max() < 1
    assert cable.length == pytest.approx(180 + width, abs=3 + 0.1 * width)  # the ends are round
    ends = np.sort(cable.points[[0, -1]], axis=0)
    np.testing.assert_allclose(ends, np.sort(np.array(line), axis=0), atol=2 + 0.5 * width)
    assert np.abs(cable.widths - width).max() < 1.2
    steps = np.linalg.norm(np.diff(cable.points, axis=0), axis=1)
    assert np.ptp(steps) < 0.2 and steps.max() < max(1.2, width / 2 + 0.6)


def test_a_curved_cable_is_followed_and_its_rough_edge_gives_no_spurs():
    x = np.linspace(20, 300, 200)
    line = np.column_stack([x, 120 + 60 * np.sin(x / 45)])
    smooth = draw(line, width=9)
    noise = cv2.GaussianBlur(np.random.default_rng(0).normal(0, 1, SIZE), (0, 0), 1)
    rough = cv2.GaussianBlur(smooth.astype(float), (0, 0), 1) + 0.15 * noise / noise.std() > 0.5
    (cable,) = centerlines(rough)
    near = np.linalg.norm(cable.points[:, None] - line, axis=2).min(axis=1)
    assert near[3:-3].max() < 2.5 and near[3:-3].mean() < 1
    assert np.abs(cable.widths - 9).mean() < 1


def test_a_cable_that_the_frame_cuts_off_reaches_it_with_its_width():
    (cable,) = centerlines(draw([(-50, 60), (160, 100)], width=15))
    assert sorted(cable.ends) == ["frame", "free"]
    at_frame = cable.ends.index("frame")
    assert cable.points[-at_frame][0] < 1
    assert cable.widths[-at_frame] == pytest.approx(15, abs=1.5)


def test_a_ring_is_closed():
    mask = np.zeros(SIZE, np.uint8)
    cv2.circle(mask, (160, 120), 70, 1, 8)
    (cable,) = centerlines(mask.astype(bool))
    assert cable.closed and cable.ends == ()
    assert cable.length == pytest.approx(2 * np.pi * 70, rel=0.02)
    radii = np.linalg.norm(cable.points - [160, 120], axis=1)
    assert radii == pytest.approx(70, abs=1.5)
    assert 2 < np.linalg.norm(cable.points[0] - cable.points[-1]) < 6  # next to it, and not repeated


def test_holes_and_specks_of_a_weak_model_change_nothing():
    line = through((160, 120), 20, 220)
    mask = draw(line, width=10)
    noise = np.random.default_rng(0).random(SIZE)
    holes, specks = mask & (noise < 0.03), ~mask & (noise > 0.99)
    (cable,) = centerlines(mask & ~holes | specks)
    assert distance_to_line(cable.points, line).max() < 2


# --- Several cables ----------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [20, 35, 60, 90])
@pytest.mark.parametrize("widths", [(8, 8), (5, 14)])
def test_crossing_cables_are_told_apart(angle, widths):
    lines = through((160, 120), 10, 230), through((160, 120), 10 + angle, 210)
    mask = draw(lines[0], width=widths[0]) | draw(lines[1], width=widths[1])
    cables = centerlines(mask)
    assert len(cables) == 2
    for cable, line, width in zip(cables, lines, widths, strict=True):
        assert distance_to_line(cable.points, line).max() < 3
        assert cable.ends == ("free", "free")
        assert np.abs(cable.widths - width).max() < 2  # also at the crossing, where the mask is wider
    (crossing,) = find_crossings(cables)
    assert np.hypot(crossing.point[0] - 160, crossing.point[1] - 120) < 5
    assert crossing.cables == (1, 2)
    assert crossing.angle == pytest.approx(angle, abs=8)


def test_three_cables_through_one_place():
    lines = [through((160, 120), angle, length) for angle, length in ((5, 230), (65, 215), (125, 200))]
    cables = centerlines(draw(*lines))
    assert len(cables) == 3
    for cable, line in zip(cables, lines, strict=True):
        assert distance_to_line(cable.points, line).max() < 3
    assert {crossing.cables for crossing in find_crossings(cables)} == {(1, 2), (1, 3), (2, 3)}


def test_a_cable_that_crosses_itself():
    t = np.linspace(-0.4, 1.4, 300) * np.pi
    line = np.column_stack([160 + 110 * np.sin(t), 110 + 80 * np.sin(2 * t)])  # an open figure eight
    (cable,) = centerlines(draw(line, width=7))
    near = np.linalg.norm(cable.points[:, None] - line, axis=2).min(axis=1)
    assert near[2:-2].max() < 3 and not cable.closed
    (crossing,) = find_crossings([cable])
    assert crossing.cables == (1, 1)
    assert np.hypot(crossing.point[0] - 160, crossing.point[1] - 110) < 4


def test_at_a_t_junction_the_straight_cable_goes_on_and_the_third_branch_ends():
    cables = centerlines(draw([(30, 120), (290, 120)], [(150, 120), (170, 220)]))
    assert len(cables) == 2
    assert cables[0].length > 250 and np.abs(cables[0].points[:, 1] - 120).max() < 2
    assert sorted(cables[1].ends) == ["cable", "free"]
    end = cables[1].points[-cables[1].ends.index("cable")]
    assert abs(end[1] - 124) < 4  # at the edge of the other cable
    assert find_crossings(cables) == []


@pytest.mark.parametrize(("gap", "n_cables"), [(5, 1), (25, 2)])
def test_a_gap_is_bridged_if_it_is_shorter_than_the_cable_is_wide(gap, n_cables):
    mask = draw([(30, 100), (290, 140)], width=10)
    mask[:, 160 : 160 + gap] = False
    assert len(centerlines(mask)) == n_cables


def test_a_gap_between_ends_that_do_not_face_each_other_stays():
    mask = draw([(30, 120), (150, 120)], [(165, 121), (165, 230)], width=9)
    assert len(centerlines(mask)) == 2


def test_cables_that_lie_beside_each_other_do_not_cross():
    cables = centerlines(draw([(20, 100), (300, 100)], [(20, 130), (300, 130)]))
    assert len(cables) == 2 and find_crossings(cables) == []


# --- Masks without cables ----------------------------------------------------------------------


def blob():
    mask = np.zeros(SIZE, np.uint8)
    cv2.circle(mask, (160, 120), 60, 1, -1)
    return mask.astype(bool)


def one_pixel():
    mask = np.zeros(SIZE, bool)
    mask[50, 60] = True
    return mask


@pytest.mark.parametrize(
    "mask",
    [np.zeros(SIZE, bool), np.ones(SIZE, bool), np.ones((1, 1), bool), one_pixel(), blob()],
    ids=["empty", "full", "tiny", "one pixel", "disc"],
)
def test_masks_without_a_direction_have_no_cable(mask):
    assert centerlines(mask) == []
    assert find_crossings([]) == []
    assert instance_mask(mask, []).shape == mask.shape and instance_mask(mask, []).max() == 0


def test_noise_gives_valid_cables():
    mask = np.random.default_rng(1).random((120, 160)) < 0.4
    cables = centerlines(mask)
    assert [cable.id for cable in cables] == list(range(1, len(cables) + 1))
    for cable in cables:
        assert np.isfinite(cable.points).all() and (cable.widths > 0).all()
        assert (cable.points >= 0).all() and (cable.points <= [159, 119]).all()
    assert instance_mask(mask, cables).max() == len(cables)


# --- Outputs -----------------------------------------------------------------------------------


def test_the_instance_mask_divides_the_mask_by_cable():
    mask = draw([(30, 60), (290, 60)], width=6) | draw([(100, 30), (120, 220)], width=16)
    far_blob = np.zeros(SIZE, np.uint8)
    cv2.circle(far_blob, (240, 170), 25, 1, -1)
    both = mask | far_blob.astype(bool)
    ids = instance_mask(both, centerlines(both))
    assert ids.dtype == np.uint16
    np.testing.assert_array_equal(ids > 0, mask)  # the blob has no centerline
    assert (ids[60, 40:85] == 1).all() and (ids[60, 130:280] == 1).all()
    assert (ids[90:210][mask[90:210]] == 2).all()
    assert ids[63, 106] == 2  # 3 px from either axis, which is more of the thin cable than of the wide one


def test_the_document_says_everything_as_json():
    cables = centerlines(draw(through((160, 120), 0, 280), through((160, 120), 60)))
    document = json.loads(json.dumps(cables_document("a.png", SIZE, cables)))
    assert (document["image"], document["width"], document["height"]) == ("a.png", 320, 240)
    for cable, described in zip(cables, document["cables"], strict=True):
        np.testing.assert_allclose(described["points"], cable.points, atol=0.006)
        np.testing.assert_allclose(described["widths"], cable.widths, atol=0.006)
        assert [end["kind"] for end in described["ends"]] == list(cable.ends)
        assert described["ends"][1]["x"] == pytest.approx(described["points"][-1][0])
        assert described["id"] == cable.id and described["length"] == pytest.approx(cable.length, abs=0.06)
    (crossing,) = document["crossings"]
    assert crossing["cables"] == [1, 2] and crossing["angle"] == pytest.approx(60, abs=6)
    assert (crossing["x"], crossing["y"]) == pytest.approx((160, 120), abs=3)


def test_a_skeleton_is_traced_pixel_by_pixel():
    mask = np.zeros(SIZE, bool)
    mask[120, 20:301] = mask[20:221, 160] = True
    branches = find_branches(mask, distance_to_edge(mask))
    assert len(branches) == 4
    assert {tuple(branch.points[i]) for branch in branches for i in (0, -1)} == {
        (20, 120), (300, 120), (160, 20), (160, 220), (160, 120),
    }  # fmt: skip
    assert sum(len(branch.points) for branch in branches) == mask.sum() + 3  # the center is in all four
