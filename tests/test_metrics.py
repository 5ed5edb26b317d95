from dataclasses import astuple

import numpy as np
import pytest

from metrics import score


def row(text):
    return np.array([[character == "#" for character in text]])


@pytest.mark.parametrize(
    ("prediction", "truth", "iou", "dice", "precision", "recall"),
    [
        ("##..", "##..", 1, 1, 1, 1),
        ("##..", ".##.", 1 / 3, 1 / 2, 1 / 2, 1 / 2),
        ("###.", "#...", 1 / 3, 1 / 2, 1 / 3, 1),
        ("##..", "..##", 0, 0, 0, 0),
        ("....", "....", 1, 1, 1, 1),
        ("....", "#...", 0, 0, 0, 0),
        ("#...", "....", 0, 0, 0, 0),
    ],
)
def test_hand_made_cases(prediction, truth, iou, dice, precision, recall):
    assert astuple(score(row(prediction), row(truth))) == pytest.approx((iou, dice, precision, recall))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        score(row("#."), row("#.."))
