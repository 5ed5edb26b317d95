"""Pictures of what the model sees, should find, and finds."""

import cv2
import numpy as np

TRUTH_COLOR = (0, 220, 0)
PREDICTION_COLOR = (255, 0, 200)


def overlay(image: np.ndarray, mask: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Tint the masked pixels of an RGB uint8 (H, W, 3) image; `mask` is bool (H, W)."""
    tinted = image.copy()
    tinted[mask] = (0.4 * image[mask] + 0.6 * np.array(color)).astype(np.uint8)
    return tinted


def draw_points(image: np.ndarray, points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Draw a prompt, in the image's own pixels: points as discs, a box as a frame.

    `points` (N, 2) float and `labels` (N,) int are as `decoder.decode` takes them.
    """
    drawn = image.copy()
    radius = max(2, max(image.shape[:2]) // 80)
    for point in np.rint(points[labels == 1]).astype(int):
        cv2.circle(drawn, point.tolist(), radius, (255, 255, 0), -1)
    corners = np.rint(points[labels >= 2]).astype(int)
    if len(corners) == 2:
        cv2.rectangle(drawn, corners[0].tolist(), corners[1].tolist(), (255, 255, 0), radius // 2)
    return drawn


def shrink(picture: np.ndarray, longest: int) -> np.ndarray:
    """An image (H, W, 3) or a bool mask (H, W) no larger than needed; of a mask thin parts are kept."""
    if max(picture.shape[:2]) <= longest:
        return picture
    scale = longest / max(picture.shape[:2])
    size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
    small = cv2.resize(picture.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    return small > 0.25 if picture.dtype == bool else np.rint(small).astype(np.uint8)


def outline(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the edge of a bool mask (H, W) on a copy of an image (H, W, 3)."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(image.copy(), contours, -1, TRUTH_COLOR, 1)


def contact_sheet(pictures: list[np.ndarray], columns: int = 4, width: int = 400) -> np.ndarray:
    """A contact sheet of RGB pictures of any size, each scaled to one width (or at most as high)."""
    cells = []
    for picture in pictures:
        scale = width / max(picture.shape[:2])
        size = [max(1, round(length * scale)) for length in picture.shape[1::-1]]
        cells.append(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
    rows = []
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        whole = np.zeros((max(len(cell) for cell in row), columns * width, 3), np.uint8)
        for column, cell in enumerate(row):
            whole[: cell.shape[0], column * width : column * width + cell.shape[1]] = cell
        rows.append(whole)
    return np.vstack(rows)


def panel(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Image | truth | prediction side by side: RGB uint8 (H, 3 W, 3) from masks bool (H, W)."""
    return np.hstack(
        [
            image,
            overlay(image, truth, TRUTH_COLOR),
            overlay(image, prediction, PREDICTION_COLOR),
        ]
    )


def sheet(panels: list[np.ndarray], width: int = 960) -> np.ndarray:
    """Stack panels of any size under each other, each scaled to one width."""
    rows = []
    for picture in panels:
        height = max(1, round(picture.shape[0] * width / picture.shape[1]))
        rows.append(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA))
    return np.vstack(rows)
