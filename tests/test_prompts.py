"""Prompts drawn for a mask."""

import numpy as np
from conftest import draw_cable, rng

from imaging import prompts
from sam.point_labels import ABSENT, BOX_CORNER_1, BOX_CORNER_2, FOREGROUND_POINT, NOT_A_POINT


def test_points_lie_on_cables_one_to_three_of_them():
    target = draw_cable(rng(), (64, 64), 3).astype(np.uint8) * 255
    counts = set()
    for seed in range(40):
        points, labels = prompts.draw_prompt("point", target, (64, 64), 64, rng(seed))
        count = int((labels == FOREGROUND_POINT).sum())
        counts.add(count)
        assert labels.tolist() == [FOREGROUND_POINT] * count + [NOT_A_POINT] + [ABSENT] * (3 - count)
        assert all(target[int(y), int(x)] for x, y in points[:count])
    assert counts == {1, 2, 3}


def test_prompts_are_in_pixels_of_the_frame():
    target = np.zeros((16, 16), np.uint8)  # of an image of 60 x 64 pixels, 4 x 4 in a cell
    target[14, 3] = 255  # rows 56 to 59, columns 12 to 15
    points, _ = prompts.draw_prompt("point", target, (60, 64), 64, rng())
    assert points[0].tolist() == [13.5, 57.5]
    boxes = [prompts.draw_prompt("box", target, (60, 64), 64, rng(seed))[0].ravel() for seed in range(20)]
    assert np.abs(np.array(boxes) - [12, 56, 15, 59]).max() <= 0.2 + 1e-6
    assert np.max(boxes, axis=0)[3] <= 59


def test_box_surrounds_the_cables_with_jitter_inside_the_frame():
    target = np.zeros((64, 64), np.uint8)
    target[10:30, 0:50] = 255
    boxes = []
    for seed in range(40):
        points, labels = prompts.draw_prompt("box", target, (48, 64), 64, rng(seed))
        assert labels.tolist() == [BOX_CORNER_1, BOX_CORNER_2]
        boxes.append(points.ravel())
    boxes = np.array(boxes)
    assert np.abs(boxes - [0, 10, 49, 29]).max() <= 2.5 + 1e-6
    assert np.ptp(boxes, axis=0)[[1, 2, 3]].min() > 0.5 and boxes.min() >= 0


def test_mixed_draws_all_kinds_and_empty_masks_get_none():
    target = draw_cable(rng(), (64, 64), 3).astype(np.uint8) * 255
    labels = [prompts.draw_prompt("mixed", target, (64, 64), 64, rng(seed))[1] for seed in range(60)]
    counts = [sum(label in one for one in labels) for label in (FOREGROUND_POINT, BOX_CORNER_1)]
    assert all(count > 10 for count in (*counts, 60 - sum(counts)))
    for kind in prompts.PROMPT_KINDS:
        points, labels = prompts.draw_prompt(kind, np.zeros((64, 64), np.uint8), (64, 64), 64, rng())
        assert (labels == ABSENT).all() and len(points) == prompts.PROMPT_TOKENS[kind]


def test_a_cable_thinner_than_half_a_cell_is_still_prompted():
    target = np.where(np.eye(20) > 0, 50, 0).astype(np.uint8)
    points, labels = prompts.draw_prompt("point", target, (20, 20), 20, rng())
    assert labels[0] == FOREGROUND_POINT and points[0, 0] == points[0, 1]
