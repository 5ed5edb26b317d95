import numpy as np
import pytest

from metrics import iou_and_dice


def row(text):
    return np.array([[character == "#" for character in text]])


@pytest.mark.parametrize(
    ("prediction", "truth", "iou", "dice"),
    [
        ("##..", "##..", 1, 1),
        ("##..", ".##.", 1 / 3, 1 / 2),
        ("##..", "..##", 0, 0),
        ("....", "....", 1, 1),
        ("....", "#...", 0, 0),
        ("#...", "....", 0, 0),
    ],
)
def test_hand_made_cases(prediction, truth, iou, dice):
    assert iou_and_dice(row(prediction), row(truth)) == pytest.approx((iou, dice))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        iou_and_dice(row("#."), row("#.."))
