"""Metrics against hand-made cases and other implementations."""

import pickle
from dataclasses import asdict

import cv2
import numpy as np
import pytest
from scipy import ndimage
from skimage.morphology import skeletonize

from imaging import metrics
from imaging.metrics import GroundTruth


def score(prediction, truth):
    return metrics.score(prediction, GroundTruth.from_mask(truth))


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
    scores = score(row(prediction), row(truth))
    assert (scores.iou, scores.dice) == pytest.approx((iou, dice))
    assert (scores.precision, scores.recall) == pytest.approx((precision, recall))
    # A mask of one row is its own boundary region.
    assert scores.boundary_iou == pytest.approx(iou)


@pytest.mark.parametrize(
    ("prediction", "truth", "cldice"),
    [
        ("##..", "##..", 1),
        ("....", "....", 1),
        ("##..", "..##", 0),
        ("....", "#...", 0),
        ("#...", "....", 0),
    ],
)
def test_cldice_at_its_ends(prediction, truth, cldice):
    assert score(row(prediction), row(truth)).cldice == cldice


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        score(row("#."), row("#.."))


def bar(top, bottom, left=10, right=90, side=100):
    mask = np.zeros((side, side), bool)
    mask[top:bottom, left:right] = True
    return mask


def test_the_boundary_region_is_two_pixels_inside_the_edge():
    region = metrics.boundary_region(bar(20, 40))
    assert region.sum() == 20 * 80 - 16 * 76
    assert not region[22:38, 12:88].any()
    at_the_frame = np.ones((10, 10), bool)
    assert metrics.boundary_region(at_the_frame).sum() == 100 - 36


def test_boundary_iou_sees_a_shift_that_iou_hardly_does():
    wide, shifted = bar(20, 80), bar(22, 82)
    scores = score(shifted, wide)
    assert scores.iou > 0.9
    ours, theirs = metrics.boundary_region(shifted), metrics.boundary_region(wide)
    assert scores.boundary_iou == pytest.approx((ours & theirs).sum() / (ours | theirs).sum())
    assert scores.boundary_iou < 0.3


def test_cldice_sees_a_gap_and_forgives_width():
    cable = bar(48, 53)
    wider = bar(46, 55)
    broken = cable.copy()
    broken[:, 40:60] = False
    assert score(wider, cable).cldice > 0.98 and score(wider, cable).iou < 0.6
    # Its own lines all lie on the truth; of the true line a quarter is not on it.
    recall = 1 - 20 / np.count_nonzero(skeletonize(cable))
    assert score(broken, cable).cldice == pytest.approx(2 * recall / (1 + recall), abs=0.01)


@pytest.mark.parametrize("width", [1, 3, 5, 8, 15])
@pytest.mark.parametrize("angle", [0, 30, 45])
def test_widths_are_those_that_were_drawn(width, angle):
    canvas = np.zeros((201, 201), np.uint8)
    end = 90 * np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    cv2.line(canvas, *[tuple(np.rint(100 + sign * end).astype(int).tolist()) for sign in (-1, 1)], 1, width)
    mask = canvas.astype(bool)
    truth = GroundTruth.from_mask(mask)
    distance = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    # Another implementation of the distance.
    assert (truth.widths == (2 * distance.reshape(-1)[truth.centerline] - 1).astype(np.float32)).all()
    true_width = (np.sqrt(180**2 + np.pi * mask.sum()) - 180) * 2 / np.pi  # with the half discs at its ends
    assert np.median(truth.widths) == pytest.approx(true_width, abs=1.3)


def test_a_set_has_means_totals_and_thirds_of_width():
    rng = np.random.default_rng(0)
    truths = [bar(20, 23), bar(20, 27), bar(20, 41), np.zeros((100, 100), bool)]
    logits = [np.where(truth, 1.0, -1.0) for truth in truths]
    logits[0][:, :50] = -1  # half of the thin one is missed
    logits[3][:10, :10] = 1  # a false positive
    logits = [x + rng.uniform(-0.5, 0.5, x.shape) for x in logits]
    stats = [
        metrics.compute_stats(x, GroundTruth.from_mask(truth))
        for x, truth in zip(logits, truths, strict=True)
    ]
    summary = metrics.aggregate(stats)
    assert summary["iou"] == pytest.approx((0.5 + 1 + 1 + 0) / 4)
    found, true = 240 / 2 + 560 + 1680, 240 + 560 + 1680
    assert summary["total_iou"] == pytest.approx(found / (true + 100))
    assert summary["recall_thin"] == pytest.approx(0.5, abs=0.05)
    assert summary["recall_medium"] == summary["recall_thick"] == 1
    assert "recall_thick" not in metrics.aggregate(stats[:1])


def test_the_best_threshold_is_the_one_that_scores_best():
    rng = np.random.default_rng(0)
    truth = bar(20, 30)
    logits = np.where(truth, 2.0, 0.0) + rng.normal(0, 0.4, truth.shape)
    summary = metrics.aggregate([metrics.compute_stats(logits, GroundTruth.from_mask(truth))])
    ious = {t: score(logits > t, truth).iou for t in metrics.THRESHOLDS}
    assert summary["best_iou"] == pytest.approx(max(ious.values()))
    assert ious[summary["best_threshold"]] == pytest.approx(max(ious.values()))
    assert 0.7 < summary["best_threshold"] < 1.4 and summary["iou"] < 0.5
    assert 0 in metrics.THRESHOLDS


def test_logits_at_a_threshold_are_not_above_it():
    truth = np.array([[True, True, False, False, True]])
    logits = np.array([[0.0, 0.125, np.nan, 99.0, -99.0]])
    stats = metrics.compute_stats(logits, GroundTruth.from_mask(truth))
    for number, threshold in enumerate(metrics.THRESHOLDS):
        above = logits > threshold
        assert stats.counts[:, number].tolist() == [(above & ~truth).sum(), (above & truth).sum()]
    assert stats.pixel_counts.tolist() == [2, 3]


def cables(seed, size, left, right):
    """Curved lines of several widths between two columns."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(size, np.uint8)
    x = np.linspace(left, right, 20)
    for width in (1, 4, 15):
        y = size[0] * (0.5 + 0.3 * np.sin(x / size[1] * rng.uniform(2, 8) + rng.uniform(0, 6)))
        cv2.polylines(mask, [np.column_stack([x, y]).astype(np.int32)], False, 1, width)
    return mask.astype(bool)


def test_a_ground_truth_is_kept_small_and_whole():
    mask = cables(0, (901, 1203), 0, 1203)
    truth = pickle.loads(pickle.dumps(GroundTruth.from_mask(mask)))  # as it comes from a data worker
    assert truth.mask.dtype == bool and (truth.mask == mask).all() and truth.shape == mask.shape
    assert len(pickle.dumps(truth)) < mask.nbytes / 12
    assert (np.flatnonzero(skeletonize(mask)) == truth.centerline).all()


@pytest.mark.parametrize(("left", "right"), [(0, 300), (80, 170), (0, 0)])
def test_stats_are_those_of_the_plain_formulas(monkeypatch, left, right):
    monkeypatch.setattr(metrics, "BAND_PIXELS", 1500)  # the pixels are counted in several bands
    truth = cables(1, (203, 301), left, right) if right else np.zeros((203, 301), bool)
    drawn = cables(2, (203, 301), left + 20, right + 10) | truth
    noise = np.random.default_rng(3).normal(0, 2, truth.shape)
    logits = (cv2.blur(np.where(drawn, 3.0, -3.0) + noise, (3, 3))).astype(np.float32)
    stats = metrics.compute_stats(logits, GroundTruth.from_mask(truth))
    prediction, true_line = logits > 0, skeletonize(truth)
    line = skeletonize(prediction)
    inside, covered = truth[line].mean(), prediction[true_line].mean() if right else 0.0
    cldice = 2 * inside * covered / (inside + covered) if right else 0.0
    assert stats.scores.cldice == pytest.approx(cldice, abs=1e-12)
    assert stats.scores.iou == (truth & prediction).sum() / (truth | prediction).sum()
    assert (stats.is_found == prediction[true_line]).all()
    expected = [[(logits[part] > t).sum() for t in metrics.THRESHOLDS] for part in (~truth, truth)]
    assert (stats.counts == expected).all()
    assert asdict(stats.scores) == asdict(metrics.score(prediction, GroundTruth.from_mask(truth)))


def images_best_at_one(n, noise):
    """Stats of `n` images whose cables have logits about 2 and whose background has logits about 0."""
    rng = np.random.default_rng(0)
    truth = GroundTruth.from_mask(bar(20, 30))
    logits = (np.where(truth.mask, 2.0, 0.0) + rng.normal(0, noise, truth.mask.shape) for _ in range(n))
    return [metrics.compute_stats(x, truth) for x in logits]


def test_a_clear_and_even_gain_moves_the_robust_threshold():
    stats = images_best_at_one(20, noise=0.4)
    assert abs(metrics.robust_threshold(stats) - metrics.aggregate(stats)["best_threshold"]) < 0.2
    assert metrics.robust_threshold(stats[:4]) == 0  # too few images


def test_the_gain_of_one_image_does_not_move_the_robust_threshold():
    """Nine images are as good at 0 as at 1, and one gains: the mean gains, but within its error."""
    truth = GroundTruth.from_mask(bar(20, 30))
    even = metrics.compute_stats(np.where(truth.mask, 3.0, -3.0), truth)
    stats = [*[even] * 9, *images_best_at_one(1, noise=0.4)]
    assert metrics.aggregate(stats)["best_threshold"] > 0.5
    assert metrics.robust_threshold(stats) == 0


def test_the_robust_threshold_is_no_farther_than_it_pays():
    """At every threshold between -3 and 3 the IoU is the same."""
    truth = GroundTruth.from_mask(bar(20, 30))
    stats = [metrics.compute_stats(np.where(truth.mask, 3.0, -3.0), truth)] * 10
    assert metrics.aggregate(stats)["best_threshold"] == -3
    assert metrics.robust_threshold(stats) == 0


def test_the_balanced_threshold_makes_precision_and_recall_equal():
    """Of 100 cable pixels, logits rise from 0 to 4; those of the 100 others fall from 2 to -2."""
    mask = np.zeros((2, 100), bool)
    mask[0] = True
    logits = np.stack([np.linspace(0, 4, 100), np.linspace(2, -2, 100)]).astype(np.float32)
    stats = [metrics.compute_stats(logits + shift, GroundTruth.from_mask(mask)) for shift in (0, 0.25)]
    # At 1 there are 75 cable pixels and 25 others above; the second image moves this by a quarter.
    assert metrics.balanced_threshold(stats[:1]) == 1
    assert metrics.balanced_threshold(stats[1:]) == 1.25
    assert metrics.balanced_threshold(stats) == 1.125
