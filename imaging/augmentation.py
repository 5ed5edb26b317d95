"""Random changes of images: color, clutter, shadow, camera. All images are RGB uint8 (H, W, 3)."""

import io
from collections.abc import Sequence
from statistics import NormalDist

import cv2
import numpy as np
from PIL import Image

# The quantiles of a standard normal distribution at 256 evenly spaced probabilities.
NORMAL_QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Copy an image (H, W, C), mirrored left-right and top-bottom with a probability of one half each."""
    code = (None, 0, 1, -1)[rng.integers(4)]
    return image.copy() if code is None else cv2.flip(image, code)


# --- Color -------------------------------------------------------------------------------------


def recolor_cables(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change colors strongly: any hue, from gray to vivid, from dark to bright."""
    return _shift_hsv(
        image,
        hue=rng.uniform(0, 180),
        saturation=(rng.uniform(0.3, 1.5), rng.uniform(-20, 60)),
        gamma=np.exp(rng.uniform(-0.7, 0.7)),
    )


def recolor_scene(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change hue, saturation and brightness of a background or a whole photo mildly."""
    return _shift_hsv(
        image,
        hue=rng.uniform(-15, 15),
        saturation=(rng.uniform(0.6, 1.4), 0.0),
        gamma=np.exp(rng.uniform(-0.4, 0.4)),
    )


def _shift_hsv(image: np.ndarray, *, hue: float, saturation: tuple[float, float], gamma: float) -> np.ndarray:
    """Change an image in HSV space.

    Args:
        hue: shift in units of 2 degrees, OpenCV's.
        saturation: factor and offset, on the scale 0..255.
        gamma: exponent of the value channel; below 1 brightens.
    """
    levels = np.arange(256, dtype=np.float32)
    table = np.stack(
        [
            (levels + hue) % 180,
            np.clip(levels * saturation[0] + saturation[1], 0, 255),
            255 * (levels / 255) ** gamma,
        ],
        axis=-1,
    )
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    return cv2.cvtColor(cv2.LUT(hsv, table.astype(np.uint8)[None]), cv2.COLOR_HSV2RGB)


# --- Clutter and shadow ------------------------------------------------------------------------


def add_clutter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw 1 to 6 objects on a copy, so that a model learns edges that do not belong to cables.

    The objects are boxes, strips along the border, text and keyboards.
    """
    for _ in range(rng.integers(1, 7)):
        layer = image.copy()
        draw = CLUTTER_KINDS[rng.integers(len(CLUTTER_KINDS))]
        draw(layer, rng.integers(0, 256, 3).tolist(), rng)
        opacity = rng.uniform(0.5, 1)
        image = cv2.addWeighted(layer, opacity, image, 1 - opacity, 0)
    return image


def _draw_box(layer: np.ndarray, color: list[int], rng: np.random.Generator) -> None:
    low, high = np.log((0.02, 0.5))
    sides = np.exp(rng.uniform(low, high, 2)) * max(layer.shape)
    _fill_box(layer, _random_point(layer, rng), sides, rng.uniform(-180, 180), color)


def _draw_strip(layer: np.ndarray, color: list[int], rng: np.random.Generator) -> None:
    width = 1 + int(rng.uniform(0.01, 0.1) * max(layer.shape))
    layer[(np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:])[rng.integers(4)]] = color


def _draw_text(layer: np.ndarray, color: list[int], rng: np.random.Generator) -> None:
    text = "".join(map(chr, rng.integers(33, 127, rng.integers(2, 12))))
    scale = np.exp(rng.uniform(*np.log((0.3, 3)))) * max(layer.shape) / 256
    start = _random_point(layer, rng) - (0.3 * layer.shape[1], 0)
    width = max(1, int(scale * rng.uniform(1, 3)))
    font = int(rng.integers(5))  # OpenCV's first five fonts
    cv2.putText(layer, text, start.astype(int).tolist(), font, scale, color, width, cv2.LINE_AA)


def _draw_keys(layer: np.ndarray, color: list[int], rng: np.random.Generator) -> None:
    """A block of 2 to 5 rows of 2 to 7 square keys, rotated."""
    pitch, angle = rng.uniform(0.03, 0.1) * max(layer.shape), rng.uniform(-180, 180)
    steps = pitch * cv2.getRotationMatrix2D((0, 0), -angle, 1.0)[:, :2].T  # to the next key, to the next row
    corner, rows, columns = _random_point(layer, rng), rng.integers(2, 6), rng.integers(2, 8)
    for row, column in np.ndindex(rows, columns):
        center = corner + (column - columns / 2) * steps[0] + (row - rows / 2) * steps[1]
        _fill_box(layer, center, (0.8 * pitch, 0.8 * pitch), angle, color)


# Functions draw(layer, color, rng) that draw one object on `layer`, in place.
CLUTTER_KINDS = (_draw_box, _draw_strip, _draw_text, _draw_keys)


def _random_point(layer: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0, 1, 2) * layer.shape[1::-1]


def _fill_box(
    layer: np.ndarray, center: np.ndarray, sides: Sequence[float] | np.ndarray, angle: float, color: list[int]
) -> None:
    """Fill a rectangle, rotated by `angle` degrees, with smooth edges."""
    corners = cv2.boxPoints((tuple(center), tuple(sides), angle))
    cv2.fillPoly(layer, [np.rint(corners * 8).astype(np.int32)], color, cv2.LINE_AA, shift=3)


def cast_shadow(cut_out: np.ndarray, image: np.ndarray, rng: np.random.Generator) -> None:
    """Darken an image (H, W, 3), in place, beside the cables (H, W, 4) that will be pasted on it."""
    height, width = image.shape[:2]
    unit = max(height, width) / 256
    shift = np.column_stack([np.eye(2), unit * rng.uniform(-5, 5, 2)])
    shadow = cv2.warpAffine(cut_out[..., 3], shift, (width, height))
    shadow = cv2.GaussianBlur(shadow, (0, 0), unit * rng.uniform(0.7, 4)).astype(np.float32)
    np.rint(image * (1 - rng.uniform(0.2, 0.7) / 255 * shadow[..., None]), out=image, casting="unsafe")


# --- Camera ------------------------------------------------------------------------------------


def camera_degradation(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Imitate a camera: brightness and contrast, and sometimes blur, noise and JPEG artifacts."""
    levels = np.arange(256) * rng.uniform(0.75, 1.25) + rng.uniform(-25, 25)
    image = cv2.LUT(image, np.clip(levels, 0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.2))
    if rng.random() < 0.3:
        # Random bytes and a table of quantiles: many times faster than drawing normal numbers.
        table = np.rint(NORMAL_QUANTILES * rng.uniform(2, 10)).astype(np.int16)
        noise = table[rng.integers(256, size=image.shape, dtype=np.uint8)]
        image = cv2.add(image, noise, dtype=cv2.CV_8U)
    if rng.random() < 0.3:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(rng.integers(30, 90)))
        image = np.asarray(Image.open(buffer))
    return image
