"""Drawing masks, prompts and contact sheets. All images are RGB uint8 (H, W, 3), masks bool (H, W)."""

import unicodedata
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from imaging.centerlines import Cable, Crossing
from sam.point_labels import BOX_CORNERS, FOREGROUND_POINT

# A prediction against the ground truth. The three stay apart with every color vision deficiency and on the
# dark gray that `darkened` leaves of any image; a test simulates this.
FOUND_COLOR = (120, 255, 160)
MISSED_COLOR = (60, 130, 255)
WRONG_COLOR = (255, 90, 0)
LEGEND = (("found", FOUND_COLOR), ("missed", MISSED_COLOR), ("wrong", WRONG_COLOR))
OUTLINE_COLOR = (0, 255, 60)
PROMPT_COLOR = (255, 255, 0)
# Of neighboring cables; they stay apart for most people with a color vision deficiency (Okabe and Ito, 2008).
CABLE_COLORS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 200, 120),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
    (0, 114, 178),
)


def darkened(image: np.ndarray) -> np.ndarray:
    """A dark gray copy of an image, on which every color can be seen."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.cvtColor(cv2.convertScaleAbs(gray, alpha=0.45), cv2.COLOR_GRAY2RGB)


def overlay(image: np.ndarray, prediction: np.ndarray, ground_truth: np.ndarray | None = None) -> np.ndarray:
    """Draw on a dark gray copy of an image what a prediction found, missed and wrongly took for cable.

    Without a ground truth, all of the prediction counts as found. Every mask is drawn larger by 1/800 of the
    longer side of the image, so that a thin cable can be seen where the image is shown small.
    """
    if ground_truth is None:
        ground_truth = prediction
    drawn = darkened(image)
    shading = drawn.copy()
    kernel = np.ones(2 * [2 * round(max(image.shape[:2]) / 800) + 1], np.uint8)
    outside = ~(ground_truth | prediction)
    parts = (
        (prediction & ~ground_truth, WRONG_COLOR),
        (ground_truth & ~prediction, MISSED_COLOR),
        (ground_truth & prediction, FOUND_COLOR),
    )
    for mask, color in parts if kernel.size > 1 else ():
        drawn[cv2.dilate(mask.view(np.uint8), kernel).view(bool) & outside] = color
    for mask, color in parts:
        drawn[mask] = (0.2 * shading[mask] + 0.8 * np.array(color)).astype(np.uint8)
    return drawn


def _line_of_text(parts: Sequence[tuple[str, tuple[int, int, int]]], image_side: int) -> np.ndarray:
    """Texts in their colors on one dark line, RGB uint8 (h, w, 3), for an image with this longer side.

    The font of Pillow has ASCII only: accents are left out, and other letters become question marks.
    """
    font = ImageFont.load_default(max(10, image_side / 45))
    _, top, _, bottom = font.getbbox("Mg")
    gap = font.getlength("n")
    line = Image.new("RGB", (round(gap), round(bottom + top / 2)), (20, 20, 20))
    for text, color in parts:
        letters = unicodedata.normalize("NFKD", text)
        plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
        shown = plain.encode("ascii", "replace").decode()
        start, width = line.width, font.getlength(shown) + gap
        line = ImageOps.expand(line, (0, 0, round(width), 0), (20, 20, 20))
        ImageDraw.Draw(line).text((start, 0), shown, color, font)
    return np.asarray(line)


WHITE = (255, 255, 255)


def label(image: np.ndarray, text: str, with_legend: bool = False) -> np.ndarray:
    """Write a line of text on the top left corner of a copy of an image; what does not fit is cut off."""
    line = _line_of_text([(text, WHITE), *(LEGEND if with_legend else ())], max(image.shape[:2]))
    height, width = image.shape[:2]
    labeled = image.copy()
    labeled[: len(line), : line.shape[1]] = line[:height, :width]
    return labeled


def caption(image: np.ndarray, text: str) -> np.ndarray:
    """Put a line of text and the legend of the colors above an image; what does not fit is cut off."""
    line = _line_of_text([(text, WHITE), *LEGEND], max(image.shape[:2]))[:, : image.shape[1]]
    padding = ((0, 0), (0, image.shape[1] - line.shape[1]), (0, 0))
    return np.vstack([np.pad(line, padding, constant_values=20), image])


def draw_points(image: np.ndarray, points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Draw a prompt on a copy of an image: foreground points as discs, a box as a frame.

    Args:
        points: float (N, 2), (x, y) in pixels of the image.
        labels: int (N,), labels from `sam.point_labels`.
    """
    drawn = image.copy()
    radius = max(2, max(image.shape[:2]) // 80)
    for point in np.rint(points[labels == FOREGROUND_POINT]).astype(int):
        cv2.circle(drawn, point.tolist(), radius, PROMPT_COLOR, -1)
    corners = np.rint(points[np.isin(labels, BOX_CORNERS)]).astype(int)
    if len(corners) == 2:
        cv2.rectangle(drawn, corners[0].tolist(), corners[1].tolist(), PROMPT_COLOR, radius // 2)
    return drawn


def shrink(image: np.ndarray, longest: int) -> np.ndarray:
    """Shrink an image or a mask to the longest side `longest`; a smaller one is returned unchanged.

    A pixel of a shrunk mask is foreground if more than a quarter of its area is: thin cables stay visible.
    """
    if max(image.shape[:2]) <= longest:
        return image
    scale = longest / max(image.shape[:2])
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    small = cv2.resize(image.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    return small > 0.25 if image.dtype == bool else np.rint(small).astype(np.uint8)


def outline(image: np.ndarray, mask: np.ndarray, thickness: int = 1) -> np.ndarray:
    """Draw the edge of a mask on a copy of an image; `thickness` is in pixels."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(image.copy(), contours, -1, OUTLINE_COLOR, thickness)


def contact_sheet(images: Sequence[np.ndarray], columns: int = 4, width: int = 400) -> np.ndarray:
    """Arrange images of any size in rows; the longer side of each is scaled to `width` pixels."""
    cells = []
    for image in images:
        scale = width / max(image.shape[:2])
        size = [max(1, round(length * scale)) for length in image.shape[1::-1]]
        cells.append(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    rows = []
    for start in range(0, len(cells), columns):
        row_cells = cells[start : start + columns]
        row = np.zeros((max(len(cell) for cell in row_cells), columns * width, 3), np.uint8)
        for column, cell in enumerate(row_cells):
            row[: cell.shape[0], column * width : column * width + cell.shape[1]] = cell
        rows.append(row)
    return np.vstack(rows)


def draw_cables(image: np.ndarray, cables: Sequence[Cable], crossings: Sequence[Crossing]) -> np.ndarray:
    """Draw centerlines on a darkened copy of an image, each in a color of its own.

    The id of a cable is at its first point. A dot marks each end, and a white circle each crossing.
    """
    drawn = (0.6 * image).astype(np.uint8)
    unit = max(1, round(max(image.shape[:2]) / 600))
    for cable in cables:
        color = CABLE_COLORS[(cable.id - 1) % len(CABLE_COLORS)]
        points = np.rint(16 * cable.points).astype(np.int32)  # 4 binary digits after the point
        cv2.polylines(drawn, [points], cable.closed, (0, 0, 0), 4 * unit, cv2.LINE_AA, 4)
        cv2.polylines(drawn, [points], cable.closed, color, 2 * unit, cv2.LINE_AA, 4)
        for point in [] if cable.closed else points[[0, -1]].tolist():
            cv2.circle(drawn, point, 16 * 4 * unit, color, -1, cv2.LINE_AA, 4)
    for crossing in crossings:
        center = np.rint(16 * np.array(crossing.point)).astype(int).tolist()
        for color, thickness in ((0, 0, 0), 3 * unit), ((255, 255, 255), unit):
            cv2.circle(drawn, center, 16 * 8 * unit, color, thickness, cv2.LINE_AA, 4)
    for cable in cables:
        _draw_id(drawn, cable, unit)
    return drawn


def _draw_id(image: np.ndarray, cable: Cable, unit: int) -> None:
    """Write the id of a cable beside its first point, within the image."""
    text, font = str(cable.id), cv2.FONT_HERSHEY_SIMPLEX
    size, baseline = cv2.getTextSize(text, font, 0.6 * unit, 2 * unit)
    right, bottom = image.shape[1] - size[0], image.shape[0] - baseline
    x = min(max(0, round(float(cable.points[0, 0])) + 6 * unit), max(0, right))
    y = min(max(size[1], round(float(cable.points[0, 1])) - 6 * unit), bottom)
    color = CABLE_COLORS[(cable.id - 1) % len(CABLE_COLORS)]
    cv2.putText(image, text, (x, y), font, 0.6 * unit, (0, 0, 0), 5 * unit, cv2.LINE_AA)
    cv2.putText(image, text, (x, y), font, 0.6 * unit, color, 2 * unit, cv2.LINE_AA)


def panel(image: np.ndarray, ground_truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Show an image and its `overlay` side by side: RGB uint8 (H, 2 W, 3)."""
    return np.hstack([image, overlay(image, prediction, ground_truth)])


MAX_ROW_HEIGHT = 4  # of a sheet, in units of its width; a strip of a few columns would fill the memory


def sheet(panels: Sequence[np.ndarray], width: int = 1280) -> np.ndarray:
    """Stack images of any size vertically, each scaled to `width` pixels, or less if it is very tall."""
    tallest = MAX_ROW_HEIGHT * width
    rows = []
    for image in panels:
        height = max(1, round(image.shape[0] * width / image.shape[1]))
        size = (min(width, max(1, width * tallest // height)), min(height, tallest))
        row = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        rows.append(np.pad(row, ((0, 0), (0, width - size[0]), (0, 0)), constant_values=20))
    return np.vstack(rows)
