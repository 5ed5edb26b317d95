"""Mask files: which pixels of a file are foreground.

Programs write masks in many ways, and no single rule fits all of them. `read_mask` decides by the content of
the file, and refuses a file that can be understood in two ways.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import cv2
import numpy as np
from PIL import Image

from imaging.files import DecodedFile, FileError, decode, decoding

Color = tuple[int, int, int]

# Which values of a mask are foreground: gray values, palette indices or RGB colors. None: decide by the file.
MaskValues = tuple[int | Color, ...] | Literal["nonzero"] | None

# A value belongs to an edge if it lies between a smaller and a larger one nearby. Labels lie next to the
# background on large parts of their outline, and inside they have neighbors of the same value.
MIN_LABEL_PIXELS = 16
MIN_LABEL_SHARE = 0.005  # of the foreground
MAX_EDGE_SHARE = 0.3  # of the pixels of a label
MIN_FLAT_SHARE = 0.6  # of the pixels of a label
MAX_SMALL_LABEL = 32  # three values up to this one are never soft edges: edges need many levels
MAX_LISTED_VALUES = 16

# Background and foreground of a mask with soft edges, as fractions of its maximum. The rest is in between.
LOW, HIGH = 0.12, 0.75
NEAR_LOW, NEAR_HIGH = 4, 8  # pixels from a value in between to background and foreground
MAX_BAD_SHARE = 0.1  # of all pixels above LOW: values in between that are no edge
MIN_EXACT_SHARE = 0.8  # of the background: pixels with the same value, which a photo does not have
# Pixels above half of the maximum, relative to the area of the soft mask.
MIN_KEPT = 0.6
MAX_KEPT = 1.12  # more only if many pixels are at the maximum; a photo of a bright cable on black is above
MIN_AT_TOP = 0.3  # of the pixels above HIGH

MAX_MIXED_SHARE = 0.25  # of the foreground of a color mask: colors that fill no areas
MAX_COLORS = 64  # of the cables in one mask
SAME_COLOR = 12  # largest difference in a channel
BLACK = 16  # largest value of a color that counts as black in a lossy file
VOID = (224, 224, 192)  # color of the pixels that the PASCAL VOC format leaves undecided


@dataclass(frozen=True)
class MaskReading:
    """A mask, and what tells labels of several classes apart.

    mask: bool (H, W), the foreground.
    level: in a gray mask of two values, the foreground value; else None.
    colors: in a color or palette mask, the colors of the foreground.
    """

    mask: np.ndarray
    level: int | None = None
    colors: frozenset[Color] = frozenset()


def read_mask(path: Path, mask_values: MaskValues = None) -> np.ndarray:
    """Read a mask file as bool (H, W).

    Without `mask_values`, the foreground is, in this order:

    - of a file with an alpha channel that is not constant: what is opaque;
    - of a color or palette file: every color but that of the background. The background is index 0 of a
      palette, or otherwise the most frequent color at the border of the image;
    - of a gray file: what is above half of its maximum, or above 127 if the file is JPEG.

    With `mask_values`, the foreground is every pixel with one of these gray values, palette indices or RGB
    colors; "nonzero" means every pixel that is not 0.

    Raises FileError if the file cannot be decoded, is no mask (a photo, probabilities), or holds several
    labels that only `mask_values` can tell apart.
    """
    return interpret(decode(path), mask_values).mask


def interpret(file: DecodedFile, mask_values: MaskValues = None) -> MaskReading:
    """Like `read_mask`, for a decoded file."""
    with decoding(file.path):
        if mask_values is not None:
            return MaskReading(_select(file, mask_values))
        alpha = _alpha(file.image)
        if alpha is not None:
            if int(alpha.min()) < 0.9 * int(alpha.max()):
                _require_no_mask_in_colors(file, alpha)
                return _read_gray(file.path, alpha)
            if alpha.max() == 0 and _is_constant(file.image):  # nothing is drawn on a transparent canvas
                return MaskReading(np.zeros(alpha.shape, bool))
        gray = _gray_values(file)
        if gray is None:
            return _read_lossy_color(file) if file.is_lossy else _read_color(file)
        if file.is_16_bit_color and not gray.any():
            raise FileError(f"{file.path}: a 16-bit color mask of small values; save it as 8-bit gray")
        return _read_lossy_gray(file.path, gray) if file.is_lossy else _read_gray(file.path, gray)


# --- Channels ----------------------------------------------------------------------------------


def _alpha(image: Image.Image) -> np.ndarray | None:
    """The alpha channel as uint8 (H, W), or None if the file has no transparency."""
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        return np.asarray(image)[..., -1]
    if "transparency" in image.info and image.mode in ("1", "L", "RGB", "P"):
        return np.asarray(image.convert("RGBA"))[..., 3]
    return None


def _rgb(image: Image.Image) -> np.ndarray:
    """The colors as uint8 (H, W, 3), whatever the alpha channel."""
    if image.mode in ("P", "RGBA", "LA"):  # Pillow warns of palettes with transparency without RGBA
        return np.asarray(image.convert("RGBA"))[..., :3]
    return np.asarray(image.convert("RGB"))


def _is_constant(image: Image.Image) -> bool:
    rgb = _rgb(image)
    return bool((rgb == rgb[0, 0]).all())


def _gray_values(file: DecodedFile) -> np.ndarray | None:
    """The values of a gray file as uint8 or uint16 (H, W); None for a file with colors."""
    image = file.image
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise FileError(f"{file.path}: expected gray values from 0 to 65535, got {values.max()}")
        return values.astype(np.uint16)
    if image.mode == "F":
        raise FileError(f"{file.path}: expected whole numbers of 8 or 16 bits, got 32-bit floating point")
    if image.mode == "P" and _palette_hides_indices(image):
        return None
    rgb = _rgb(image)
    largest = _largest(rgb)
    spread = largest - cv2.min(cv2.min(rgb[..., 0], rgb[..., 1]), rgb[..., 2])
    # JPEG also gives gray pixels a tinge of color.
    is_gray = (
        np.count_nonzero(spread > 2 * SAME_COLOR) <= 1e-3 * spread.size if file.is_lossy else not spread.any()
    )
    return largest if is_gray else None


def _palette_colors(image: Image.Image) -> np.ndarray:
    """The colors of a palette file, uint8 (256, 3)."""
    palette = np.zeros((256, 3), np.uint8)
    given = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    palette[: len(given)] = given
    return palette


def _palette_hides_indices(image: Image.Image) -> bool:
    """Whether two of the indices in a palette file have the same color."""
    used = np.unique(np.asarray(image))
    return len(np.unique(_palette_colors(image)[used], axis=0)) < len(used)


def _border(values: np.ndarray) -> np.ndarray:
    """The values (n, ...) along the border of (H, W, ...)."""
    return np.concatenate([values[0], values[-1], values[1:-1, 0], values[1:-1, -1]])


def _most_frequent(values: np.ndarray) -> int:
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()])


def _select(file: DecodedFile, mask_values: MaskValues) -> np.ndarray:
    """The pixels with one of `mask_values`, bool (H, W)."""
    if file.is_lossy:
        raise FileError(
            f"{file.path}: lossy compression changes values, so mask_values cannot select any; expected PNG"
        )
    plane = np.asarray(file.image) if file.image.mode == "P" else _gray_values(file)
    if mask_values == "nonzero":
        return np.asarray(plane != 0 if plane is not None else _rgb(file.image).any(axis=2))
    assert mask_values is not None
    numbers = [value for value in mask_values if isinstance(value, int)]
    colors = [value for value in mask_values if not isinstance(value, int)]
    if plane is None and not colors:
        raise FileError(
            f"{file.path}: has colors, but mask_values lists gray values; expected [[r, g, b], ...]"
        )
    if file.image.mode == "1" and 1 in numbers:  # the file holds 1 where Pillow gives 255
        numbers.append(255)
    mask = np.isin(plane, numbers) if plane is not None else np.zeros(file.image.size[::-1], bool)
    if colors:
        mask |= np.isin(_packed(_rgb(file.image)), _packed(np.array(colors)))
    return mask


# --- Gray --------------------------------------------------------------------------------------


def _read_gray(path: Path, values: np.ndarray) -> MaskReading:
    """Read the foreground of lossless values, uint8 or uint16 (H, W)."""
    counts = np.bincount(values.ravel())
    found, top = np.flatnonzero(counts), int(values.max())
    if top == 0:
        return MaskReading(np.zeros(values.shape, bool))
    if len(found) > 1 and found[0] > top / 2:
        raise FileError(
            f"{path}: not a binary mask, its smallest value {found[0]} is above half of its largest {top}; "
            "expected a background of 0"
        )
    if len(found) == 2:
        return MaskReading(values > top / 2, level=top)
    if len(found) > 2:
        _require_no_labels(path, values, counts)
        _require_soft_edges(path, values, top)
    return MaskReading(values > top / 2)


def _require_no_labels(path: Path, values: np.ndarray, counts: np.ndarray) -> None:
    """Raise FileError if a value between 0 and the maximum fills areas of its own."""
    found, top = np.flatnonzero(counts), len(counts) - 1
    candidates = found[(found > 0) & (found < top)]
    if len(found) > MAX_LISTED_VALUES:  # values next to the two ends are noise or ringing
        candidates = candidates[(candidates > LOW * top) & (candidates < (1 - LOW) * top)]
    labels = candidates if top <= MAX_SMALL_LABEL else _flat_values(values, values, candidates, len(counts))
    if not len(labels):
        return
    listed = found if len(found) <= MAX_LISTED_VALUES else np.array([0, *labels[:MAX_LISTED_VALUES], top])
    _refuse_labels(path, ", ".join(map(str, listed)))


def _refuse_labels(path: Path, values: str) -> NoReturn:
    raise FileError(
        f"{path}: not a binary mask but labels, with the values {values}; say in the YAML file which of them "
        "are cable, e.g. mask_values: [1], or mask_values: nonzero if all of them are "
        "(predict.py expects masks of two values)"
    )


def _flat_values(keys: np.ndarray, values: np.ndarray, candidates: np.ndarray, n_keys: int) -> np.ndarray:
    """The candidates that fill areas instead of lying between two values at an edge.

    Args:
        keys: int (H, W), what tells the areas apart, from 0 to `n_keys` - 1; 0 is background.
        values: uint8 or uint16 (H, W), the distance to the background.
        candidates: int (n,), keys.
    """
    counts = np.bincount(keys.ravel(), minlength=n_keys)
    minimum = max(MIN_LABEL_PIXELS, MIN_LABEL_SHARE * (keys.size - counts[0]))
    # A file may have a few pixels of foreground only.
    if keys.size - counts[0] < 10 * MIN_LABEL_PIXELS:
        minimum = 1
    candidates = candidates[counts[candidates] >= minimum]
    if not len(candidates):
        return candidates
    flat = np.bincount(keys[_same_neighbors(keys) >= 2], minlength=n_keys)
    on_edge = np.bincount(keys[_is_edge(values)], minlength=n_keys)
    n = counts[candidates]
    is_flat = (flat[candidates] >= MIN_FLAT_SHARE * n) & (on_edge[candidates] < MAX_EDGE_SHARE * n)
    return candidates[is_flat]


def _same_neighbors(keys: np.ndarray) -> np.ndarray:
    """How many of the 8 neighbors have the same value: uint8 (H, W)."""
    count = np.zeros(keys.shape, np.uint8)
    for dy, dx in ((0, 1), (1, -1), (1, 0), (1, 1)):
        here = (slice(0, keys.shape[0] - dy), slice(max(0, -dx), keys.shape[1] - max(0, dx)))
        there = (slice(dy, None), slice(max(0, dx), keys.shape[1] + min(0, dx)))
        equal = keys[here] == keys[there]
        count[here] += equal
        count[there] += equal
    return count


def _is_edge(values: np.ndarray) -> np.ndarray:
    """Whether a smaller and a larger value are within two pixels: bool (H, W)."""
    window = np.ones((5, 5), np.uint8)
    return (cv2.erode(values, window) < values) & (cv2.dilate(values, window) > values)


def _within(mask: np.ndarray, radius: int) -> np.ndarray:
    """Whether a pixel of `mask` is within `radius` pixels, in a square window: bool (H, W)."""
    window = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
    return cv2.dilate(mask.astype(np.uint8), window).astype(bool)


def _require_soft_edges(path: Path, values: np.ndarray, top: int) -> None:
    """Raise FileError unless the values between background and foreground are edges or thin cables."""
    low, high = values <= LOW * top, values >= HIGH * top
    between = ~low & ~high
    n_low, n_between = np.count_nonzero(low), np.count_nonzero(between)
    n_foreground = low.size - n_low
    bad = between & ~(_within(low, NEAR_LOW) & _within(high, NEAR_HIGH))
    exact = np.count_nonzero(values <= 0.01 * top + 1)
    # Soft edges keep the area: as much is lost inside the edge as is gained outside.
    kept = np.count_nonzero(values > top / 2) / (values[~low].sum(dtype=np.float64) / top)
    at_top = np.count_nonzero(values >= 0.95 * top) / max(int(np.count_nonzero(high)), 1)
    if (
        np.count_nonzero(bad) > MAX_BAD_SHARE * n_foreground
        or 2 * n_between > n_low
        or (exact < MIN_EXACT_SHARE * n_low and n_between > MAX_BAD_SHARE * n_foreground)
        or (kept > MAX_KEPT and at_top < MIN_AT_TOP)
    ):
        raise FileError(
            f"{path}: not a binary mask, {n_between / n_foreground:.0%} of its foreground "
            f"has values from {LOW * top:.0f} to {HIGH * top:.0f}; expected two values such as 0 and 255, "
            "and others only at edges (is it a photo, or are these probabilities?)"
        )
    if kept < MIN_KEPT:
        raise FileError(
            f"{path}: most of its foreground is below half of its maximum {top}, because the cables became "
            "thinner than a pixel when it was resized; resize the original mask with the filter 'nearest', "
            "or use it in its full size"
        )


def _read_lossy_gray(path: Path, values: np.ndarray) -> MaskReading:
    """Read the foreground of values from a lossy file, uint8 (H, W)."""
    top = int(values.max())
    if top <= 127 and top > values.min():
        raise FileError(
            f"{path}: a lossy mask (JPEG) whose largest value is {top}; expected 0 and 255, since the "
            "foreground is above 127. Values such as 0 and 1 do not survive JPEG: save the mask as PNG"
        )
    mask = values > 127
    if mask.any() and not mask.all():
        _require_soft_edges(path, values, 255)
    return MaskReading(mask)


# --- Color -------------------------------------------------------------------------------------


def _unpack(packed: int) -> Color:
    return packed >> 16, packed >> 8 & 255, packed & 255


def _packed(rgb: np.ndarray) -> np.ndarray:
    """Colors uint8 (..., 3) as int32 (...)."""
    wide = rgb.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def _largest(rgb: np.ndarray) -> np.ndarray:
    """The largest channel of each pixel: (H, W). NumPy's maximum over the last axis is slow."""
    return cv2.max(cv2.max(rgb[..., 0], rgb[..., 1]), rgb[..., 2])


def _distance(rgb: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Largest difference in a channel from a color: uint8 (H, W)."""
    return _largest(cv2.absdiff(rgb, np.broadcast_to(color, rgb.shape)))


def _require_no_mask_in_colors(file: DecodedFile, alpha: np.ndarray) -> None:
    """Raise FileError if the opaque part is itself a mask: black and a few other colors."""
    opaque = _packed(_rgb(file.image)[alpha >= 0.98 * alpha.max()])
    colors, counts = np.unique(opaque, return_counts=True)
    if 1 < len(colors) <= MAX_LISTED_VALUES and colors[0] == 0 and counts[0] > 0.05 * len(opaque):
        raise FileError(
            f"{file.path}: its alpha channel could be the mask, and its colors as well; "
            "save it without an alpha channel, or as a gray file of two values"
        )


def _read_color(file: DecodedFile) -> MaskReading:
    """Read the foreground of a lossless color or palette file: every color but that of the background."""
    image = file.image
    if image.mode == "P" and _palette_hides_indices(image):
        indices = np.asarray(image)
        if len(np.unique(indices)) > MAX_COLORS:
            raise FileError(f"{file.path}: not a mask, it has more than {MAX_COLORS} colors (is it a photo?)")
        mask = indices != _background_index(image)
        colors = _palette_colors(image)[np.unique(indices[mask])]
        return MaskReading(mask, colors=frozenset(_unpack(int(packed)) for packed in _packed(colors)))
    rgb = _rgb(image)
    if image.mode == "P":
        background = _palette_colors(image)[_background_index(image)]
    else:
        background = np.array(_unpack(_most_frequent(_packed(_border(rgb)))), np.uint8)
    distance = _distance(rgb, background)
    touched = distance > SAME_COLOR
    if np.count_nonzero(distance == 0) < MIN_EXACT_SHARE * np.count_nonzero(~touched):
        return _read_distance(file.path, distance)
    is_pure, colors = _pure_colors(rgb, distance)
    if VOID in colors and len(colors) > 1:
        listed = np.unique(np.asarray(image)).tolist() if image.mode == "P" else sorted(colors)
        _refuse_labels(file.path, ", ".join(map(str, listed)) + f" (the color {VOID} marks undecided pixels)")
    n_touched, n_mixed = np.count_nonzero(touched), np.count_nonzero(touched & ~is_pure)
    # At soft edges: closer to the cable nearby than to the background.
    window = np.ones((2 * NEAR_HIGH + 1, 2 * NEAR_HIGH + 1), np.uint8)
    nearby = np.maximum(cv2.dilate(distance, window), 2 * BLACK)
    if n_mixed > MAX_MIXED_SHARE * n_touched:
        coverage = np.where(is_pure, 255, np.rint(255.0 * distance / nearby)).astype(np.uint8)
        _require_soft_edges(file.path, coverage, 255)
    near = cv2.dilate(distance, np.ones((5, 5), np.uint8))
    return MaskReading(is_pure | (distance >= np.maximum(near, 2 * BLACK) / 2), colors=colors)


def _background_index(image: Image.Image) -> int:
    """The index of the background in a palette file: 0, unless the border of the image says otherwise."""
    border = _border(np.asarray(image))
    most_frequent, black = _most_frequent(border), np.all(_palette_colors(image) == 0, axis=1)
    if (border == 0).any() and (black[0] or not black[most_frequent]):
        return 0
    return most_frequent


def _pure_colors(rgb: np.ndarray, distance: np.ndarray) -> tuple[np.ndarray, frozenset[Color]]:
    """Which pixels have a color that fills areas, bool (H, W), and these colors; at most `MAX_COLORS`."""
    touched = distance > 0
    packed = _packed(rgb[touched])
    if len(np.unique(packed)) > MAX_COLORS:  # soft edges or noise, which gives areas almost as the background
        touched = distance > SAME_COLOR
        packed = _packed(rgb[touched])
    colors, keys_touched, counts = np.unique(packed, return_inverse=True, return_counts=True)
    keys = np.zeros(distance.shape, np.int32)
    keys[touched] = keys_touched + 1
    frequent = 1 + np.argsort(-counts, kind="stable")[:MAX_COLORS]
    pure = _flat_values(keys, distance, frequent, len(colors) + 1)
    is_pure = np.zeros(len(colors) + 1, bool)
    is_pure[pure] = True
    return is_pure[keys], frozenset(_unpack(int(colors[key - 1])) for key in pure)


def _read_lossy_color(file: DecodedFile) -> MaskReading:
    """Read the foreground of a lossy color file: what differs from the color of the border."""
    rgb = _rgb(file.image)
    background = np.median(_border(rgb), axis=0).astype(np.uint8)
    if background.max() <= BLACK:
        return _read_lossy_gray(file.path, _largest(rgb))
    return _read_distance(file.path, _distance(rgb, background))


def _read_distance(path: Path, distance: np.ndarray) -> MaskReading:
    """Read the foreground of a color file without areas of one color, by the distance to the background."""
    top = int(distance.max())
    _require_soft_edges(path, distance, top)
    return MaskReading(distance > top / 2)
