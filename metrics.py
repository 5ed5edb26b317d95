"""Measures on binary masks at the picture's own resolution."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scores:
    """How one predicted mask agrees with the truth, every measure in 0..1."""

    iou: float
    dice: float
    precision: float
    recall: float


def score(prediction: np.ndarray, truth: np.ndarray) -> Scores:
    """Compare two bool masks of one shape (h, w).

    Two empty masks agree: 1. If only one is empty, all measures are 0.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction is {prediction.shape} but truth is {truth.shape}")
    intersection = int(np.count_nonzero(prediction & truth))
    predicted, true = int(np.count_nonzero(prediction)), int(np.count_nonzero(truth))
    if predicted + true == 0:
        return Scores(1.0, 1.0, 1.0, 1.0)
    return Scores(
        iou=intersection / (predicted + true - intersection),
        dice=2 * intersection / (predicted + true),
        precision=intersection / max(predicted, 1),
        recall=intersection / max(true, 1),
    )
