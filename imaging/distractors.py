"""Objects that are not cables, drawn or pasted below or above the cables. Images are RGB uint8 (H, W, 3).

They teach a model which edges and strips do not belong to cables. Most are parts of other photos, with the
textures of real things.
"""

import cv2
import numpy as np

from imaging.geometry import touched_box

MAX_DISTRACTORS = 5


def add_distractors(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put 1 to 5 objects on a copy of an image: parts of another photo, strips, bars, text, keys, grooves.

    `other`, of the size of the image, is the photo whose parts are used.
    """
    image = image.copy()
    for _ in range(rng.integers(1, MAX_DISTRACTORS + 1)):
        kind = rng.random()
        if kind < 0.5:
            put_patch(image, other, rng)
        else:
            DRAWN[int((kind - 0.5) / 0.5 * len(DRAWN))](image, rng)
    return image


# --- Parts of another photo -------------------------------------------------------------------

PATCH_SIDES = (0.03, 1.2)  # of the longest side of the image; many are long strips


def put_patch(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put a rotated part of another photo on an image, in place: a box, a polygon or an ellipse.

    Returns its soft mask, float32 (H, W). It may cast a shadow.
    """
    height, width = image.shape[:2]
    longest = max(height, width)
    low, high = np.log(PATCH_SIDES)
    sides = np.exp(rng.uniform(low, high, 2)) * longest
    center, angle = rng.uniform(0, 1, 2) * (width, height), rng.uniform(0, 180)
    shape = np.zeros((height, width), np.uint8)
    kind = rng.integers(3)
    if kind == 0:
        corners = cv2.boxPoints((center.tolist(), sides.tolist(), angle))
        _fill(shape, corners)
    elif kind == 1:
        turns = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
        corners = center + 0.5 * sides * np.column_stack([np.cos(turns), np.sin(turns)])
        _fill(shape, corners)
    else:
        cv2.ellipse(shape, (center.tolist(), sides.tolist(), angle), 255, -1, cv2.LINE_AA)
    if rng.random() < 0.5:
        _cast_shadow(image, shape, rng)
    # The part comes from elsewhere in the photo, and its brightness is its own.
    moved = np.roll(other, tuple(rng.integers(0, (height, width))), axis=(0, 1))
    alpha, box = shape.astype(np.float32) / 255, touched_box(shape)
    _blend(image[box], moved[box] * np.float32(rng.uniform(0.5, 1.2)), alpha[box])
    return alpha


def _cast_shadow(image: np.ndarray, shape: np.ndarray, rng: np.random.Generator) -> None:
    """Darken an image, in place, around an object of soft mask `shape`, uint8 (H, W)."""
    sigma = rng.uniform(1, 6) * max(shape.shape) / 256
    box = touched_box(shape, margin=int(4 * sigma) + 2)  # OpenCV's kernel for float32 ends at 4 sigma
    shadow = cv2.GaussianBlur(shape[box].astype(np.float32) / 255, (0, 0), sigma)
    _blend(image[box], np.float32(0), rng.uniform(0.2, 0.6) * shadow)


def _blend(image: np.ndarray, color: np.ndarray | np.float32, alpha: np.ndarray) -> None:
    """Blend a gray level or an image float32 (H, W, 3) into an image, in place, by alpha float32 (H, W)."""
    blended = image + (color - image) * cv2.merge([alpha] * 3)
    image[:] = np.clip(np.rint(blended), 0, 255)


def _fill(layer: np.ndarray, corners: np.ndarray, color: float | list[int] = 255) -> None:
    """Fill a polygon (n, 2) of (x, y) with smooth edges."""
    cv2.fillPoly(layer, [np.rint(corners * 8).astype(np.int32)], color, cv2.LINE_AA, shift=3)


# --- Drawn objects -----------------------------------------------------------------------------

BAR_WIDTHS = (0.015, 0.12)  # of the longest side of the image


def draw_strip(image: np.ndarray, rng: np.random.Generator) -> None:
    """A strip along the border of the image, as of a table's edge, in place."""
    width = 1 + int(rng.uniform(0.01, 0.1) * max(image.shape))
    strip = image[(np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:])[rng.integers(4)]]
    opacity = rng.uniform(0.5, 1)
    strip[:] = np.rint(strip + (_random_color(rng) - strip) * opacity)


def draw_bar(image: np.ndarray, rng: np.random.Generator) -> None:
    """A straight profile in perspective, as of a shelf or a frame, in place; it may cast a shadow.

    Its colors change across it and not along it. Half of the bars lie along the frame of the image.
    """
    height, width = image.shape[:2]
    longest, turn = max(height, width), rng.uniform(0, 2 * np.pi)
    if rng.random() < 0.5:
        turn = rng.integers(4) * np.pi / 2 + rng.normal(0, 0.06)
    along = longest * np.array([np.cos(turn), np.sin(turn)])
    start = rng.uniform(0, 1, 2) * (width, height)
    if rng.random() < 0.6:  # else it starts inside the image
        start = start - 2 * along
    end = start + rng.uniform(0.2, 4) * along
    across = 0.5 * np.exp(rng.uniform(*np.log(BAR_WIDTHS))) * np.array([-along[1], along[0]])
    far = np.exp(rng.uniform(-0.4, 0.4)) * across
    corners = np.array([start - across, start + across, end + far, end - far], np.float32)
    profile = draw_profile(rng)
    n = len(profile)
    matrix = cv2.getPerspectiveTransform(np.array([[0, 0], [0, n], [1, n], [1, 0]], np.float32), corners)
    bar = cv2.warpPerspective(profile[:, None], matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
    shape = np.zeros((height, width), np.uint8)
    _fill(shape, corners)
    if rng.random() < 0.5:
        _cast_shadow(image, shape, rng)
    box = touched_box(shape)
    _blend(image[box], bar[box].astype(np.float32), shape[box].astype(np.float32) / 255)


def draw_profile(rng: np.random.Generator) -> np.ndarray:
    """The colors across a bar, uint8 (64, 3): mostly gray, with up to six faces and grooves between them."""
    x = np.linspace(-1, 1, 64)
    faces = rng.uniform(-1, 1, rng.integers(1, 7))
    edges = np.sort(rng.uniform(-1, 1, len(faces) - 1))
    shade = rng.uniform(0, 0.5) * faces[np.searchsorted(edges, x)] + rng.uniform(-0.4, 0.4) * x
    for edge in edges[rng.random(len(edges)) < 0.4]:
        shade -= rng.uniform(0.2, 0.8) * np.exp(-(((x - edge) / 0.04) ** 2))
    color = rng.uniform(30, 245) + rng.normal(0, 5 if rng.random() < 0.75 else 50, 3)
    return np.clip(color * (1 + shade[:, None]), 0, 255).astype(np.uint8)


def draw_text(image: np.ndarray, rng: np.random.Generator) -> None:
    """A word, in place."""
    text = "".join(map(chr, rng.integers(33, 127, rng.integers(2, 12))))
    scale = np.exp(rng.uniform(*np.log((0.3, 3)))) * max(image.shape) / 256
    start = rng.uniform(0, 1, 2) * image.shape[1::-1] - (0.3 * image.shape[1], 0)
    thickness = max(1, int(scale * rng.uniform(1, 3)))
    font = int(rng.integers(5))  # OpenCV's first five fonts
    color = _random_color(rng).tolist()
    cv2.putText(image, text, start.astype(int).tolist(), font, scale, color, thickness, cv2.LINE_AA)


def draw_keys(image: np.ndarray, rng: np.random.Generator) -> None:
    """A block of 2 to 5 rows of 2 to 9 keys, rotated, in place."""
    pitch, angle = rng.uniform(0.03, 0.12) * max(image.shape), rng.uniform(-180, 180)
    steps = pitch * cv2.getRotationMatrix2D((0, 0), -angle, 1.0)[:, :2].T  # to the next key, the next row
    corner = rng.uniform(0, 1, 2) * image.shape[1::-1]
    rows, columns = rng.integers(2, 6), rng.integers(2, 10)
    side, color, edge = rng.uniform(0.7, 0.95) * pitch, _random_color(rng), rng.uniform(0.4, 1.4)
    for row, column in np.ndindex(rows, columns):
        center = corner + (column - columns / 2) * steps[0] + (row - rows / 2) * steps[1]
        for size, shade in ((side, edge), (0.8 * side, 1.0)):  # a key has a border of another brightness
            box = cv2.boxPoints((center.tolist(), (size, size), angle))
            _fill(image, box, np.clip(color * shade, 0, 255).tolist())


def draw_grooves(image: np.ndarray, rng: np.random.Generator) -> None:
    """Thin straight lines of low contrast across the image, as between tiles or planks, in place."""
    height, width = image.shape[:2]
    longest, angle = max(height, width), rng.uniform(0, np.pi)
    lines = np.zeros((height, width), np.uint8)
    thickness = max(1, round(rng.uniform(0.5, 2) * longest / 256))
    for turn in (angle, angle + np.pi / 2)[: rng.integers(1, 3)]:
        along = np.array([np.cos(turn), np.sin(turn)])
        across, pitch = np.array([-along[1], along[0]]), rng.uniform(0.1, 0.4) * longest
        for offset in np.arange(-longest, longest, pitch) + rng.uniform(0, pitch):
            middle = np.array([width, height]) / 2 + offset * across
            ends = np.rint([middle - 2 * longest * along, middle + 2 * longest * along]).astype(int)
            cv2.line(lines, ends[0].tolist(), ends[1].tolist(), 255, thickness, cv2.LINE_AA)
    color, opacity = np.float32(rng.choice([0.0, 255.0])), rng.uniform(0.15, 0.5)
    _blend(image, color, opacity / 255 * lines.astype(np.float32))


def _random_color(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, 3).astype(float)


DRAWN = (draw_strip, draw_bar, draw_bar, draw_text, draw_keys, draw_grooves)
