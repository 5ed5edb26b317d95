"""Composites: cut cables out by their masks, transform them, paste them on backgrounds."""

from collections.abc import Callable, Hashable
from pathlib import Path

import cv2
import numpy as np

from imaging.files import Pair, read_image, read_mask
from imaging.geometry import fit_size, resize_area, resize_image, resize_mask, to_u8

# --- Reading -----------------------------------------------------------------------------------


def load_pair(pair: Pair, longest: int) -> np.ndarray:
    """A photo with its soft mask as the fourth channel: uint8 (H, W, 4)."""
    image, mask = read_image(pair.image_path), read_mask(pair.mask_path)
    size = _bounded_size(mask.shape, longest)
    mask = resize_mask(mask.astype(np.float32), size)
    return cv2.merge([resize_image(image, size), to_u8(mask)])


def load_cut_out(pair: Pair, longest: int) -> np.ndarray:
    """A photo's cables with soft edges: RGBA uint8 (H, W, 4); see `cut_out`."""
    return cut_out(load_pair(pair, longest))


def load_background(path: Path, longest: int) -> np.ndarray:
    """A background picture: RGB uint8 (H, W, 3)."""
    image = read_image(path)
    return resize_image(image, _bounded_size(image.shape[:2], longest))


def longest_side(canvas: tuple[int, int]) -> int:
    """The longest side of what is read for a canvas: enough to zoom into."""
    return max(2 * max(canvas), 1024)


def _bounded_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    return size if max(size) <= longest else fit_size(size, longest)


def _read_anew(make: Callable[..., np.ndarray], item: Hashable, longest: int) -> np.ndarray:
    return make(item, longest)


# --- Cutting out and pasting -------------------------------------------------------------------

# How far inside the mask, in pixels, a cable's color is trusted to be the cable's own.
TRUSTED_DEPTH = 2.0


def cut_out(image_and_mask: np.ndarray) -> np.ndarray:
    """Cut the cables of a photo out, with a soft edge and no trace of the old background.

    A photo's edge pixels mix cable and background, and masks are rarely exact to the pixel. Pasted
    as they are, they leave a halo from which a model learns to see the pasting. So every pixel
    outside the cables' core takes the color of the nearest core pixel; the mask's edge is smoothed.

    Args:
        image_and_mask: uint8 (H, W, 4).

    Returns:
        uint8 (H, W, 4): cable colors spread everywhere, and the soft mask.
    """
    image, mask = image_and_mask[..., :3], image_and_mask[..., 3].copy()
    if not mask.any():
        return image_and_mask
    inside = mask >= min(128, mask.max())
    depth = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 3)
    # Cables thinner than twice the trusted depth keep their ridge, the deepest pixels around.
    ridge = cv2.dilate(depth, np.ones((5, 5), np.uint8))
    core = inside & (depth >= np.minimum(TRUSTED_DEPTH, ridge))
    _, labels = cv2.distanceTransformWithLabels(
        (~core).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    color_of_label = np.zeros((labels.max() + 1, 3), np.uint8)
    color_of_label[labels[core]] = image[core]
    return cv2.merge([color_of_label[labels], cv2.GaussianBlur(mask, (0, 0), 0.7)])


def paste(
    cut_out: np.ndarray,
    image: np.ndarray,
    mask: np.ndarray,
    recolor: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:
    """Blend a cut-out into an image by its soft mask, and add that to the image's mask, in place.

    Only the pixels that the cables touch are computed, a few in a hundred; `recolor` changes their
    colors first. `cut_out` uint8 (H, W, 4), `image` uint8 (H, W, 3), `mask` float32 (H, W) in 0..1.
    """
    touched = np.flatnonzero(cut_out[..., 3])
    if len(touched) == 0:
        return
    cables = cut_out.reshape(-1, 4)[touched]
    colors = np.ascontiguousarray(cables[:, None, :3])  # (n, 1, 3), a picture for OpenCV
    colors = (recolor(colors) if recolor else colors)[:, 0].astype(np.float32)
    alpha = cables[:, 3:].astype(np.float32) / 255
    image_pixels, mask_pixels = image.reshape(-1, 3), mask.reshape(-1)  # views
    below = image_pixels[touched]
    image_pixels[touched] = np.rint(below + (colors - below) * alpha)
    mask_pixels[touched] = 1 - (1 - mask_pixels[touched]) * (1 - alpha[:, 0])


# --- Transforming ------------------------------------------------------------------------------

SCALE = (0.6, 1.6)  # relative to the whole photo filling the canvas
SHIFT = 0.3  # of the canvas side, to either direction
MIN_IN_FRAME = 0.25  # of the cables' pixels


def random_affine(cut_out: np.ndarray, canvas: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Rotate, scale and shift a cut-out (H, W, 4) on a canvas of size (h, w), never out of the frame.

    At least a quarter of the pixels that the cables have after scaling stay in the frame.
    """
    size = cut_out.shape[:2]
    fit = min(canvas[0] / size[0], canvas[1] / size[1])
    cable = 2 * np.argwhere(cut_out[::2, ::2, 3] > 127)[:, ::-1]  # (n, 2) as (x, y), one pixel in four
    for _ in range(20):
        scale = fit * np.exp(rng.uniform(*np.log(SCALE)))
        angle = rng.uniform(-180, 180)
        shift = rng.uniform(-SHIFT, SHIFT, 2) * canvas[::-1]
        matrix = _similarity(size, canvas, scale, angle, shift)
        if _share_in_frame(cable, matrix, canvas) >= MIN_IN_FRAME:
            break
    else:  # far off-center cables: as they were in the photo
        scale, matrix = fit, _similarity(size, canvas, fit, 0.0, np.zeros(2))
    return _warp(cut_out, matrix, canvas, scale)


def _similarity(
    size: tuple[int, int], canvas: tuple[int, int], scale: float, angle: float, shift: np.ndarray
) -> np.ndarray:
    """The 2 x 3 matrix that scales and turns about the center and moves it to the canvas's center."""
    center = (np.array(size[::-1]) - 1) / 2
    matrix = cv2.getRotationMatrix2D(center, angle, scale)
    matrix[:, 2] += (np.array(canvas[::-1]) - 1) / 2 - center + shift
    return matrix


def _share_in_frame(points: np.ndarray, matrix: np.ndarray, canvas: tuple[int, int]) -> float:
    if len(points) == 0:
        return 1.0
    moved = points @ matrix[:, :2].T + matrix[:, 2]
    inside = (moved >= -0.5) & (moved < np.array(canvas[::-1]) - 0.5)
    return float(inside.all(axis=1).mean())


def _warp(cut_out: np.ndarray, matrix: np.ndarray, canvas: tuple[int, int], scale: float) -> np.ndarray:
    """Warp with antialiasing: what shrinks is first averaged down to its final scale."""
    size = cut_out.shape[:2]
    if scale < 1:
        shrunk = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        ratio = np.array(size[::-1]) / shrunk[::-1]  # old pixels per new one, (x, y)
        cut_out = resize_area(cut_out, shrunk)
        # Pixel centers of the shrunk picture in coordinates of the old one: (x + 0.5) * ratio - 0.5.
        offset = matrix[:, :2] @ (0.5 * ratio - 0.5) + matrix[:, 2]
        matrix = np.column_stack([matrix[:, :2] * ratio, offset])
    # Outside, colors go on and the mask is 0: a transparent rim to repeat, with no dark edge.
    cut_out[[0, -1], :, 3] = 0
    cut_out[:, [0, -1], 3] = 0
    return cv2.warpAffine(cut_out, matrix, canvas[::-1], borderMode=cv2.BORDER_REPLICATE)


def random_crop(image: np.ndarray, canvas: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random part of a background in the canvas's proportions, resized to it.

    The part's sides are from 40 % to all of the largest that fits.
    """
    height, width = image.shape[:2]
    largest = min(height / canvas[0], width / canvas[1])
    scale = largest * rng.uniform(0.4, 1.0)
    crop_h, crop_w = max(1, int(canvas[0] * scale)), max(1, int(canvas[1] * scale))
    top, left = rng.integers(height - crop_h + 1), rng.integers(width - crop_w + 1)
    return resize_area(image[top : top + crop_h, left : left + crop_w], canvas)


def zoom(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random part of a picture, with sides from 60 % to all of the whole."""
    share = rng.uniform(0.6, 1.0)
    height, width = (max(1, round(side * share)) for side in image.shape[:2])
    top = rng.integers(image.shape[0] - height + 1)
    left = rng.integers(image.shape[1] - width + 1)
    return image[top : top + height, left : left + width]
