"""Prompts: points and boxes that tell the decoder where cables are."""

from dataclasses import dataclass

import numpy as np

from sam.point_labels import ABSENT, BOX_CORNER_1, BOX_CORNER_2, FOREGROUND_POINT, NOT_A_POINT

PROMPT_KINDS = ("none", "point", "box", "mixed")
PROMPT_TOKENS = {"none": 0, "point": 4, "box": 2, "mixed": 4}  # points per prompt of each kind
MAX_POINTS = 3
BOX_JITTER = 0.05  # largest shift of a side of the box, as a fraction of the length of the box


@dataclass(frozen=True)
class Prompt:
    """One prompt for an image: any number of points, or a box as its two corners.

    points: float32 (N, 2), (x, y) in pixels of the image.
    labels: int64 (N,), labels from `sam.point_labels`.
    """

    points: np.ndarray
    labels: np.ndarray


# The prompts of an image that has none: one prompt without points.
NO_PROMPT = (Prompt(np.zeros((0, 2), np.float32), np.zeros(0, np.int64)),)


def draw_prompt(
    kind: str, target: np.ndarray, size: tuple[int, int], img_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a random prompt for a mask: 1 to 3 points on the cables, their box with jitter, or no prompt.

    Args:
        kind: one of PROMPT_KINDS; "mixed" chooses one of the other three.
        target: soft mask uint8 (grid, grid). An empty mask gets no prompt.
        size: (h, w) of the image in the model's frame.
        img_size: side of that frame in pixels. A prompt is as exact as one cell of the grid.

    Returns:
        Points float32 (N, 2) as (x, y) in the model's frame and labels int64 (N,), N = PROMPT_TOKENS[kind].
        Unused entries have the label ABSENT.
    """
    points = np.zeros((PROMPT_TOKENS[kind], 2), np.float32)
    labels = np.full(PROMPT_TOKENS[kind], ABSENT, np.int64)
    if kind == "mixed":
        kind = ("none", "point", "box")[rng.integers(3)]
    if kind == "none" or not target.any():
        return points, labels
    # A very thin cable may cover less than half of every cell: take the cells that it covers most.
    rows, columns = np.nonzero(target >= min(128, target.max()))
    cell = img_size / len(target)
    last = np.array(size[::-1], np.float32) - 1
    if kind == "point":
        count = int(rng.integers(1, MAX_POINTS + 1))
        centers = (np.column_stack([columns, rows])[rng.integers(len(rows), size=count)] + 0.5) * cell - 0.5
        points[:count] = np.minimum(centers, last)
        labels[:count] = FOREGROUND_POINT
        labels[count] = NOT_A_POINT  # SAM ends points without a box with it
    else:
        low = np.array([columns.min(), rows.min()], np.float32) * cell
        high = np.array([columns.max() + 1, rows.max() + 1], np.float32) * cell - 1
        jitter = rng.uniform(-BOX_JITTER, BOX_JITTER, (2, 2)) * (high - low + 1)
        points[:2] = np.clip(np.stack([low, high]) + jitter, 0, last)
        labels[:2] = BOX_CORNER_1, BOX_CORNER_2
    return points, labels
