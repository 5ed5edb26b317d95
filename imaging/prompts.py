"""Prompts: points and boxes that tell the decoder where cables are."""

import numpy as np

from sam.point_labels import ABSENT, BOX_CORNERS, FOREGROUND_POINT, NOT_A_POINT

PROMPT_KINDS = ("none", "point", "box", "mixed")
BOX_JITTER = 0.05  # of the box's side
PROMPT_TOKENS = {"none": 0, "point": 4, "box": 2, "mixed": 4}


def draw_prompt(
    kind: str, target: np.ndarray, size: tuple[int, int], img_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a prompt for a mask: 1 to 3 points on the cables, their box (jittered), or none.

    Args:
        kind: one of PROMPT_KINDS; "mixed" is one of the other three.
        target: soft mask uint8 (grid, grid). An empty one gets no prompt.
        size: (h, w) of the picture in the model's input frame.
        img_size: side of that frame; prompts are as exact as the grid's cells in it.

    Returns:
        Points float32 (N, 2) as (x, y) in the frame and their labels int64 (N,), N = PROMPT_TOKENS[kind].
    """
    points = np.zeros((PROMPT_TOKENS[kind], 2), np.float32)
    labels = np.full(PROMPT_TOKENS[kind], ABSENT, np.int64)
    if kind == "mixed":
        kind = ("none", "point", "box")[rng.integers(3)]
    if kind == "none" or not target.any():
        return points, labels
    # A very thin cable may cover no cell of the grid by half: take its best covered ones.
    rows, columns = np.nonzero(target >= min(128, target.max()))
    cell = img_size / len(target)
    last = np.array(size[::-1], np.float32) - 1
    if kind == "point":
        count = int(rng.integers(1, 4))
        centers = (np.column_stack([columns, rows])[rng.integers(len(rows), size=count)] + 0.5) * cell - 0.5
        points[:count] = np.minimum(centers, last)
        labels[:count] = FOREGROUND_POINT
        labels[count] = NOT_A_POINT
    else:
        low = np.array([columns.min(), rows.min()], np.float32) * cell
        high = np.array([columns.max() + 1, rows.max() + 1], np.float32) * cell - 1
        jitter = rng.uniform(-BOX_JITTER, BOX_JITTER, (2, 2)) * (high - low + 1)
        points[:2] = np.clip(np.stack([low, high]) + jitter, 0, last)
        labels[:2] = BOX_CORNERS
    return points, labels
