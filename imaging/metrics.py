"""Metrics for thin objects: an image's logits against its ground truth, at the image's own resolution.

A mask is bool (h, w). Above a threshold of 0 a logit is foreground.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import cv2
import numpy as np
from skimage.morphology import skeletonize

# Width in pixels of the boundary region. (The usual 2 % of the diagonal is wider than a cable.)
BOUNDARY_WIDTH = 2

# Thresholds on logits at which pixels are counted. The middle one is 0: `Scores` are at this threshold.
THRESHOLDS = np.linspace(-4, 4, 65)
ZERO_INDEX = len(THRESHOLDS) // 2
PER_UNIT = 8  # thresholds per unit of a logit; a power of 2, so that multiplying by it rounds nothing

BAND_PIXELS = 1 << 20  # pixels that are counted at a time, which bounds the memory that it takes


@dataclass(frozen=True)
class Scores:
    """How well one predicted mask agrees with the ground truth; all scores are in 0..1.

    boundary_iou: IoU of the boundary regions of both masks (Cheng et al., Boundary IoU, CVPR 2021).
    cldice: harmonic mean of two fractions: of the predicted centerline inside the true mask, and of the
        true centerline inside the predicted mask (Shit et al., clDice, CVPR 2021, eq. 1 to 3).
    """

    iou: float
    dice: float
    precision: float
    recall: float
    boundary_iou: float
    cldice: float


@dataclass(frozen=True)
class GroundTruth:
    """A true mask and its centerline, which is slow to compute (n centerline pixels). It is kept small.

    shape: (h, w) of the mask.
    packed_mask: the bits of the mask, eight pixels in a byte, compressed.
    centerline: int32 (n,), indices of the centerline pixels in the flat mask, in rising order.
    widths: float32 (n,), width of the cable at each centerline pixel, in pixels.
    """

    shape: tuple[int, int]
    packed_mask: bytes
    centerline: np.ndarray
    widths: np.ndarray

    @classmethod
    def from_mask(cls, mask: np.ndarray) -> "GroundTruth":
        """Compute the centerline of a bool mask (h, w)."""
        packed_mask = zlib.compress(np.packbits(mask).tobytes(), level=1)
        box = _bounding_box(mask)
        rows, columns = np.nonzero(_skeleton(mask[box]))
        widths = _cable_widths(mask[box], (rows, columns))
        centerline = (rows + box[0].start) * mask.shape[1] + columns + box[1].start
        return cls((mask.shape[0], mask.shape[1]), packed_mask, centerline.astype(np.int32), widths)

    @property
    def mask(self) -> np.ndarray:
        """The mask, bool (h, w). It is unpacked at every use."""
        bits = np.frombuffer(zlib.decompress(self.packed_mask), np.uint8)
        return np.unpackbits(bits, count=math.prod(self.shape)).view(bool).reshape(self.shape)


@dataclass(frozen=True)
class ImageStats:
    """What one image contributes to the metrics of a set (n centerline pixels, T thresholds).

    scores: the scores of the image.
    widths: float (n,), width of the cable at each pixel of the true centerline, in pixels.
    is_found: bool (n,), whether that pixel is in the predicted mask.
    counts: int (2, T), numbers of background and of foreground pixels above each of THRESHOLDS.
    pixel_counts: int (2,), numbers of all background and of all foreground pixels.
    """

    scores: Scores
    widths: np.ndarray
    is_found: np.ndarray
    counts: np.ndarray
    pixel_counts: np.ndarray


def compute_stats(logits: np.ndarray, ground_truth: GroundTruth) -> ImageStats:
    """Compare the logits of one image, float (h, w), with its ground truth; NaN counts as background."""
    prediction, mask = logits > 0, ground_truth.mask
    histograms = _histograms(logits, mask)
    return ImageStats(
        scores=_score(prediction, mask, ground_truth),
        widths=ground_truth.widths,
        is_found=prediction.reshape(-1)[ground_truth.centerline],
        counts=histograms[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:],
        pixel_counts=histograms.sum(axis=1),
    )


def _histograms(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """How many background and how many foreground pixels have logits above exactly k thresholds.

    Returns int64 (2, T + 1). This is exact in float32, for logits at a threshold too.
    """
    lowest, n_bins = int(THRESHOLDS[0] * PER_UNIT), len(THRESHOLDS) + 1
    counts = np.zeros(256, np.int64)
    n_rows = max(1, BAND_PIXELS // logits.shape[1])
    for top in range(0, len(logits), n_rows):
        # The number of the evenly spaced thresholds that are below each logit; `fmax` ignores NaN.
        n_below = np.ceil(logits[top : top + n_rows] * PER_UNIT)
        np.fmax(n_below, lowest, out=n_below)
        np.minimum(n_below, lowest + n_bins - 1, out=n_below)
        bins = (n_below - lowest).astype(np.uint8)
        bins += mask[top : top + n_rows] * np.uint8(n_bins)
        # OpenCV counts in float32, which is exact for so few pixels.
        counts += cv2.calcHist([bins], [0], None, [256], [0, 256]).reshape(-1).astype(np.int64)
    return counts[: 2 * n_bins].reshape(2, n_bins)


def score(prediction: np.ndarray, ground_truth: GroundTruth) -> Scores:
    """Compare a predicted mask with a ground truth of the same size.

    If both masks are empty, all scores are 1. If only one is empty, all scores are 0.
    """
    return _score(prediction, ground_truth.mask, ground_truth)


def _score(prediction: np.ndarray, mask: np.ndarray, ground_truth: GroundTruth) -> Scores:
    """Like `score`, with the unpacked mask of the ground truth."""
    if prediction.shape != mask.shape:
        raise ValueError(f"the prediction is {prediction.shape} but the ground truth is {mask.shape}")
    if not prediction.any() and not mask.any():
        return Scores(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    boundary = _overlap(boundary_region(prediction), boundary_region(mask))
    box = _bounding_box(prediction)
    skeleton = _skeleton(prediction[box])
    n_true = np.count_nonzero(prediction.reshape(-1)[ground_truth.centerline])
    topology_precision = _ratio(np.count_nonzero(skeleton & mask[box]), np.count_nonzero(skeleton))
    topology_recall = _ratio(n_true, len(ground_truth.centerline))
    return Scores(
        **_overlap(prediction, mask),
        boundary_iou=boundary["iou"],
        cldice=_ratio(2 * topology_precision * topology_recall, topology_precision + topology_recall),
    )


def _bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns of the foreground of a bool mask; empty if there is none."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return slice(top, top + height), slice(left, left + width)


def _skeleton(mask: np.ndarray) -> np.ndarray:
    """The centerline of a bool mask (h, w), bool. That of a crop with all foreground is the same."""
    return skeletonize(mask) if mask.size else mask


def _overlap(prediction: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """The scores of `Scores` that count pixels, by name."""
    n_both = int(np.count_nonzero(prediction & mask))
    n_predicted, n_true = int(np.count_nonzero(prediction)), int(np.count_nonzero(mask))
    return {
        "iou": _ratio(n_both, n_predicted + n_true - n_both),
        "dice": _ratio(2 * n_both, n_predicted + n_true),
        "precision": _ratio(n_both, n_predicted),
        "recall": _ratio(n_both, n_true),
    }


def _ratio(part: float | np.integer, whole: float | np.integer) -> float:
    """`part / whole`, or 0 if `whole` is 0."""
    return float(part / whole) if whole else 0.0


def boundary_region(mask: np.ndarray) -> np.ndarray:
    """The mask's pixels within BOUNDARY_WIDTH of its outside, bool (h, w). The frame counts as outside."""
    padded = np.pad(mask, 1).astype(np.uint8)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=BOUNDARY_WIDTH)
    return mask & ~inner[1:-1, 1:-1].astype(bool)


def _cable_widths(mask: np.ndarray, centerline: tuple[np.ndarray, ...]) -> np.ndarray:
    """Width in pixels at every centerline pixel, float32: about twice its distance to the outside.

    OpenCV's distances vary by 1e-6 from call to call. Their squares are integers, so they can be rounded, and
    equal widths are equal.
    """
    if not mask.size:
        return np.zeros(0, np.float32)
    distance = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    squared = np.rint(distance[1:-1, 1:-1][centerline].astype(np.float64) ** 2)
    return (2 * np.sqrt(squared) - 1).astype(np.float32)


def aggregate(stats: Sequence[ImageStats]) -> dict[str, float]:
    """Summarize a set of at least one image.

    Returns:
        iou, dice, ...: the mean of each of the `Scores` over the images.
        total_iou: IoU of the pixels of all images together.
        recall_thin, recall_medium, recall_thick: the fraction of the true centerline that is predicted,
            in the thirds of smallest, middle and largest width. An empty third is left out: if all cables
            have the same width, for instance.
        best_threshold: the threshold on logits with the largest mean IoU.
        best_iou: the mean IoU at this threshold.
    """
    names = [field.name for field in fields(Scores)]
    summary = {name: float(np.mean([getattr(image.scores, name) for image in stats])) for name in names}
    counts = np.sum([image.counts for image in stats], axis=0)
    pixel_counts = np.sum([image.pixel_counts for image in stats], axis=0)
    summary["total_iou"] = float(_ious(counts, pixel_counts)[ZERO_INDEX])
    summary |= _recall_by_width(
        np.concatenate([image.widths for image in stats]), np.concatenate([image.is_found for image in stats])
    )
    mean_ious = iou_by_threshold(stats)
    best = int(np.argmax(mean_ious))
    return summary | {"best_threshold": float(THRESHOLDS[best]), "best_iou": float(mean_ious[best])}


def iou_by_threshold(stats: Sequence[ImageStats]) -> np.ndarray:
    """The mean IoU over the images at each of THRESHOLDS, float (T,)."""
    return np.mean([_ious(image.counts, image.pixel_counts) for image in stats], axis=0)


def _recall_by_width(widths: np.ndarray, is_found: np.ndarray) -> dict[str, float]:
    """Fraction of found centerline pixels in each third of the widths that is not empty."""
    if len(widths) == 0:
        return {}
    thin, thick = np.quantile(widths, [1 / 3, 2 / 3])
    thirds = {
        "recall_thin": widths <= thin,
        "recall_medium": (widths > thin) & (widths <= thick),
        "recall_thick": widths > thick,
    }
    return {name: float(is_found[third].mean()) for name, third in thirds.items() if third.any()}


def _ious(counts: np.ndarray, pixel_counts: np.ndarray) -> np.ndarray:
    """IoU (T,) at every threshold, 1 if the union is empty; arguments as in `ImageStats`."""
    false_positives, true_positives = counts
    union = false_positives + pixel_counts[1]
    return np.where(union > 0, true_positives / np.maximum(union, 1), 1.0)


MIN_IMAGES_FOR_THRESHOLD = 5


def robust_threshold(stats: Sequence[ImageStats]) -> float:
    """The threshold nearest to 0 whose mean IoU is within one standard error of the best mean IoU.

    The error is that of the mean difference of the IoU of each image between the two thresholds, so a small
    or uneven gain does not move the threshold (the one-standard-error rule: Breiman et al., Classification
    and Regression Trees, 1984). Below MIN_IMAGES_FOR_THRESHOLD images it is 0.
    """
    if len(stats) < MIN_IMAGES_FOR_THRESHOLD:
        return 0.0
    ious = np.stack([_ious(image.counts, image.pixel_counts) for image in stats])  # (images, T)
    losses = ious[:, [np.argmax(ious.mean(axis=0))]] - ious
    errors = losses.std(axis=0, ddof=1) / np.sqrt(len(stats))
    # A gain of one image alone equals its standard error, so rounding must not decide.
    good = THRESHOLDS[losses.mean(axis=0) <= errors + 1e-9]
    return float(good[np.argmin(np.abs(good))])


def balanced_threshold(stats: Sequence[ImageStats]) -> float:
    """The threshold at which the mean precision and the mean recall of the images differ least.

    Predicted masks are then about as large as the true ones. It moves more than `robust_threshold` if there
    are few images.
    """
    false_positives, true_positives = np.stack([image.counts for image in stats], axis=1)  # (images, T)
    n_true = np.array([image.pixel_counts[1] for image in stats])[:, None]
    precision = true_positives / np.maximum(true_positives + false_positives, 1)
    recall = true_positives / np.maximum(n_true, 1)
    return float(THRESHOLDS[np.argmin(np.abs((precision - recall).mean(axis=0)))])
