"""Measures on thin objects: of a picture's logits against its truth, at the picture's own resolution."""

from dataclasses import dataclass
from types import SimpleNamespace

import cv2
import numpy as np
from skimage.morphology import skeletonize

# Distance in pixels to which a boundary counts. (The usual 2 % of the diagonal is wider than a cable.)
BOUNDARY = 2
# Thresholds on logits; the masks that are scored are those at 0, the middle one.
THRESHOLDS = np.linspace(-4, 4, 65)


@dataclass(frozen=True)
class Scores:
    """How one predicted mask agrees with the truth, every measure in 0..1.

    boundary_iou: IoU of the two masks' rims of 2 px (Cheng et al., Boundary IoU, CVPR 2021).
    cldice: harmonic mean of how much of the predicted center lines lies on the truth, and of the true
        ones on the prediction (Shit et al., clDice, CVPR 2021, eq. 1 to 3).
    """

    iou: float
    dice: float
    precision: float
    recall: float
    boundary_iou: float
    cldice: float


@dataclass(frozen=True)
class ImageStats:
    """What one picture adds to the measures of its set.

    scores: its own.
    widths, found: float and bool (n,), for every pixel of the true center lines how wide the cable is
        there, in pixels, and whether it is predicted.
    counts: int (2, T), pixels above each of the THRESHOLDS, of the background and of the foreground.
    sizes: int (2,), all pixels of the background and of the foreground.
    """

    scores: Scores
    widths: np.ndarray
    found: np.ndarray
    counts: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class GroundTruth:
    """A true mask, bool (h, w), and what takes long to find of it: its center lines.

    lines: the rows and columns of their n pixels.
    widths: float (n,), how wide the cable is there, in pixels.
    """

    mask: np.ndarray
    lines: tuple[np.ndarray, np.ndarray]
    widths: np.ndarray

    @classmethod
    def from_mask(cls, mask: np.ndarray) -> "GroundTruth":
        lines = np.nonzero(skeletonize(mask))
        return cls(mask, lines, cable_widths(mask, lines))


def compute_stats(logits: np.ndarray, truth: GroundTruth) -> ImageStats:
    """Measure one picture by its float logits (h, w), of which above 0 is foreground."""
    logits = np.where(np.isnan(logits), -np.inf, logits)
    prediction = logits > 0
    step = THRESHOLDS[1] - THRESHOLDS[0]
    # How many of the evenly spaced thresholds each pixel is above.
    above = np.clip(np.ceil((logits - THRESHOLDS[0]) / step), 0, len(THRESHOLDS)).astype(np.int8)
    regions = (above[~truth.mask], above[truth.mask])
    histograms = np.array([np.bincount(region, minlength=len(THRESHOLDS) + 1) for region in regions])
    counts, sizes = histograms[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:], histograms.sum(axis=1)
    return ImageStats(score(prediction, truth), truth.widths, prediction[truth.lines], counts, sizes)


def score(prediction: np.ndarray, truth: GroundTruth) -> Scores:
    """Compare a bool mask (h, w) with the truth of the same size.

    Two empty masks agree: 1. If only one is empty, all measures are 0.
    """
    if prediction.shape != truth.mask.shape:
        raise ValueError(f"prediction is {prediction.shape} but truth is {truth.mask.shape}")
    if not prediction.any() and not truth.mask.any():
        return Scores(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    whole = _overlap(prediction, truth.mask)
    lines = skeletonize(prediction)
    topology_precision = _share(np.count_nonzero(truth.mask[lines]), np.count_nonzero(lines))
    topology_recall = _share(np.count_nonzero(prediction[truth.lines]), len(truth.widths))
    return Scores(
        iou=whole.iou,
        dice=whole.dice,
        precision=whole.precision,
        recall=whole.recall,
        boundary_iou=_overlap(rim(prediction), rim(truth.mask)).iou,
        cldice=_share(2 * topology_precision * topology_recall, topology_precision + topology_recall),
    )


def _overlap(prediction: np.ndarray, truth: np.ndarray) -> SimpleNamespace:
    both, predicted, true = (int(np.count_nonzero(mask)) for mask in (prediction & truth, prediction, truth))
    return SimpleNamespace(
        iou=_share(both, predicted + true - both),
        dice=_share(2 * both, predicted + true),
        precision=_share(both, predicted),
        recall=_share(both, true),
    )


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def rim(mask: np.ndarray) -> np.ndarray:
    """The pixels of a bool mask that are at most BOUNDARY from its outside (which is also the frame's)."""
    padded = np.pad(mask, 1).astype(np.uint8)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=BOUNDARY)
    return mask & ~inner[1:-1, 1:-1].astype(bool)


def cable_widths(mask: np.ndarray, lines: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Width in pixels at every pixel of the center lines: about twice the distance to the outside."""
    distance = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return 2 * distance[1:-1, 1:-1][lines] - 1


def aggregate(measured: list[ImageStats]) -> dict[str, float]:
    """Measures of a set: means over pictures under their own names, and of all pixels together:

    total_iou; recall_thin, recall_medium and recall_thick, the predicted share of the true center lines
    in the thirds of smallest, middle and largest width (without those that are empty, as where all cables
    are of one width); best_threshold, the threshold on logits with the largest mean IoU, and best_iou,
    that IoU.
    """
    summary = {
        name: float(np.mean([vars(m.scores)[name] for m in measured])) for name in vars(measured[0].scores)
    }
    counts, sizes = sum(m.counts for m in measured), sum(m.sizes for m in measured)
    summary["total_iou"] = float(_ious(counts, sizes)[len(THRESHOLDS) // 2])
    widths, found = (np.concatenate([getattr(m, name) for m in measured]) for name in ("widths", "found"))
    if len(widths):
        thin, thick = np.quantile(widths, [1 / 3, 2 / 3])
        thirds = {
            "thin": widths <= thin,
            "medium": (widths > thin) & (widths <= thick),
            "thick": widths > thick,
        }
        summary |= {
            f"recall_{name}": float(found[third].mean()) for name, third in thirds.items() if third.any()
        }
    ious = np.mean([_ious(m.counts, m.sizes) for m in measured], axis=0)
    best = int(np.argmax(ious))
    return summary | {"best_threshold": float(THRESHOLDS[best]), "best_iou": float(ious[best])}


def _ious(counts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """IoU (T,) at every threshold; `counts` and `sizes` as in `ImageStats`."""
    false, true = counts
    union = false + sizes[1]
    return np.where(union > 0, true / np.maximum(union, 1), 1.0)
