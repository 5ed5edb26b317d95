"""Measures on binary masks at the picture's own resolution."""

import numpy as np


def iou_and_dice(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """IoU and Dice of two bool masks of one shape (h, w); two empty masks agree: 1.0 and 1.0."""
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction is {prediction.shape} but truth is {truth.shape}")
    intersection = int(np.count_nonzero(prediction & truth))
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(truth))
    if total == 0:
        return 1.0, 1.0
    return intersection / (total - intersection), 2 * intersection / total
