"""Compositing: cut cables out by their masks, transform them, paste them on backgrounds.

Sizes are (h, w). A soft mask is float32 (H, W) in 0..1, or uint8 in 0..255 where it is the fourth channel
of an image (H, W, 4).
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from imaging.augmentation import (
    add_clutter,
    camera_degradation,
    cast_shadow,
    flip,
    recolor_cables,
    recolor_scene,
)
from imaging.files import read_image
from imaging.geometry import fit_size, resize_area, resize_image, resize_mask, to_u8
from imaging.pairing import Pair, read_pair

Load = Callable[[Any, int], np.ndarray]  # load(item, longest): one of the load_... functions
Read = Callable[[Load, Hashable, int], np.ndarray]  # read(load, item, longest): a cache, for instance

# --- Loading -----------------------------------------------------------------------------------


def load_pair(pair: Pair, longest: int) -> np.ndarray:
    """Load an image with its soft mask as the fourth channel: uint8 (H, W, 4).

    It is shrunk to the longest side `longest` if it is larger, or a little further if it is a JPEG image; see
    `imaging.files.decode`. Raises FileError.
    """
    image, mask = read_pair(pair, longest)
    size = bounded_size((image.shape[0], image.shape[1]), longest)
    soft_mask = resize_mask(mask.astype(np.float32), size)
    return cv2.merge([resize_image(image, size), to_u8(soft_mask)])


def load_cut_out(pair: Pair, longest: int) -> np.ndarray:
    """Load the cables of an image with soft edges: RGBA uint8 (H, W, 4), size as from `load_pair`."""
    return cut_out(load_pair(pair, longest))


def load_background(path: Path, longest: int) -> np.ndarray:
    """Load a background: RGB uint8 (H, W, 3), shrunk as from `load_pair`. Raises FileError."""
    image = read_image(path, longest)
    return resize_image(image, bounded_size((image.shape[0], image.shape[1]), longest))


def longest_side(size: tuple[int, int]) -> int:
    """The longest side at which files are loaded for a sample of `size`: leaves room to zoom in."""
    return max(2 * max(size), 1024)


def bounded_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """`size`, scaled down to the longest side `longest` if it is larger."""
    return size if max(size) <= longest else fit_size(size, longest)


def load_directly(load: Load, item: Hashable, longest: int) -> np.ndarray:
    """Return `load(item, longest)`: the `read` argument of the samples below without a cache."""
    return load(item, longest)


# --- Samples -----------------------------------------------------------------------------------

SECOND_CUT_OUT_PROBABILITY = 0.3
CLUTTER_PROBABILITY = 0.5
SHADOW_PROBABILITY = 0.5


def composite(
    pairs: Sequence[Pair],
    backgrounds: Sequence[Path],
    pair_index: int,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    augment: bool,
    read: Read = load_directly,
) -> tuple[np.ndarray, np.ndarray]:
    """Paste the cables of one pair on a random crop of a random background.

    Args:
        pairs: all pairs of the dataset; augmentation may add the cables of a second one.
        backgrounds: at least one file.
        pair_index: the pair whose cables are pasted.
        size: (h, w) of the sample.
        augment: if False, the cables keep their place and colors and the background its colors.
        read: `read(load, item, longest)` returns `load(item, longest)`, possibly from a cache.

    Returns:
        Image RGB uint8 (h, w, 3) and soft mask float32 (h, w) of all cables in it.

    Raises FileError.
    """
    longest = longest_side(size)
    background_path = backgrounds[int(rng.integers(len(backgrounds)))]
    image = random_crop(read(load_background, background_path, longest), size, rng)
    mask = np.zeros(size, np.float32)
    if not augment:
        paste(resize_area(read(load_cut_out, pairs[pair_index], longest), size), image, mask)
        return image, mask
    image = recolor_scene(flip(image, rng), rng)
    if rng.random() < CLUTTER_PROBABILITY:
        image = add_clutter(image, rng)
    indices = [pair_index]
    if rng.random() < SECOND_CUT_OUT_PROBABILITY:
        indices.insert(0, int(rng.integers(len(pairs))))
    for index in indices:
        cables = random_affine(flip(read(load_cut_out, pairs[index], longest), rng), size, rng)
        if rng.random() < SHADOW_PROBABILITY:
            cast_shadow(cables, image, rng)
        paste(cables, image, mask, partial(recolor_cables, rng=rng))
    return camera_degradation(image, rng), mask


def photo_sample(
    pair: Pair,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    augment: bool,
    read: Read = load_directly,
) -> tuple[np.ndarray, np.ndarray]:
    """Use the photo of a pair as it is, or flipped, zoomed and recolored if `augment` is True.

    Arguments, returned arrays and errors are those of `composite`.
    """
    if not augment:
        whole, true_mask = read_pair(pair)
        return resize_image(whole, size), resize_mask(true_mask.astype(np.float32), size)
    image_and_mask = flip(read(load_pair, pair, longest_side(size)), rng)
    image_and_mask = resize_area(zoom(image_and_mask, rng), size)
    image = recolor_scene(np.ascontiguousarray(image_and_mask[..., :3]), rng)
    return camera_degradation(image, rng), image_and_mask[..., 3].astype(np.float32) / 255


# --- Cutting out and pasting -------------------------------------------------------------------

# Depth inside the mask, in pixels, from which a pixel shows the color of the cable alone.
TRUSTED_DEPTH = 2.0


def cut_out(image_and_mask: np.ndarray) -> np.ndarray:
    """Cut the cables out of an image, with a soft edge and without traces of the old background.

    Pixels at the edge mix cable and background, and masks are rarely exact to the pixel. Pasted
    unchanged, these pixels would form a halo, and a model would learn to detect the pasting. So every
    pixel outside the core of the cables takes the color of the nearest core pixel, and the edge of the
    mask is smoothed.

    Args:
        image_and_mask: uint8 (H, W, 4).

    Returns:
        uint8 (H, W, 4): the colors of the cables, extended over the whole image, and the soft mask. An
        image with an empty mask is returned unchanged.
    """
    image, mask = image_and_mask[..., :3], image_and_mask[..., 3].copy()
    if not mask.any():
        return image_and_mask
    inside = mask >= min(128, mask.max())
    depth = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 3)
    # A cable thinner than twice the trusted depth keeps its deepest pixels: the ridge.
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
    """Blend a cut-out into an image and its soft mask into the mask of the image, both in place.

    Only the pixels that the cables touch are computed: a few percent of the image.

    Args:
        cut_out: uint8 (H, W, 4).
        image: uint8 (H, W, 3), contiguous.
        mask: float32 (H, W) in 0..1, contiguous.
        recolor: changes the colors of the cables, uint8 (n, 1, 3), before they are blended.
    """
    touched = np.flatnonzero(cut_out[..., 3])
    if len(touched) == 0:
        return
    cables = cut_out.reshape(-1, 4)[touched]
    pixels = np.ascontiguousarray(cables[:, None, :3])  # (n, 1, 3), an image for OpenCV
    colors = (recolor(pixels) if recolor else pixels)[:, 0].astype(np.float32)
    alpha = cables[:, 3:].astype(np.float32) / 255
    image_pixels, mask_pixels = image.reshape(-1, 3), mask.reshape(-1)  # views
    below = image_pixels[touched]
    image_pixels[touched] = np.rint(below + (colors - below) * alpha)
    mask_pixels[touched] = 1 - (1 - mask_pixels[touched]) * (1 - alpha[:, 0])


# --- Transforming ------------------------------------------------------------------------------

SCALE_RANGE = (0.6, 1.6)  # 1 fits the whole cut-out into the sample
MAX_SHIFT = 0.3  # in each direction, as a fraction of the sample's side
MIN_IN_FRAME = 0.25  # of the pixels of the cables
MAX_ATTEMPTS = 20

MIN_CROP, MIN_ZOOM = 0.4, 0.6  # smallest side of a random part, as a fraction of the largest


def random_affine(cut_out: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Rotate, scale and shift a cut-out uint8 (H, W, 4) at random; returns uint8 (h, w, 4) of `size`.

    At least a quarter of the cable pixels, counted after scaling, stay inside the frame.
    """
    old_size = (cut_out.shape[0], cut_out.shape[1])
    fit = min(size[0] / old_size[0], size[1] / old_size[1])
    cable = 2 * np.argwhere(cut_out[::2, ::2, 3] > 127)[:, ::-1]  # (n, 2) as (x, y), one pixel in four
    for _ in range(MAX_ATTEMPTS):
        scale = fit * np.exp(rng.uniform(*np.log(SCALE_RANGE)))
        angle = rng.uniform(-180, 180)
        shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * size[::-1]
        matrix = similarity_matrix(old_size, size, scale, angle, shift)
        if _share_in_frame(cable, matrix, size) >= MIN_IN_FRAME:
            break
    else:  # cables far from the center: keep their place in the photo
        scale, matrix = fit, similarity_matrix(old_size, size, fit, 0.0, np.zeros(2))
    return warp(cut_out, matrix, size, scale)


def similarity_matrix(
    old_size: tuple[int, int], size: tuple[int, int], scale: float, angle: float, shift: np.ndarray
) -> np.ndarray:
    """Matrix (2, 3) that scales and rotates (degrees) about the center, then moves it to the new center.

    `shift` (2,) is (x, y) in pixels of the result.
    """
    center = (np.array(old_size[::-1]) - 1) / 2
    matrix = cv2.getRotationMatrix2D(center.tolist(), angle, scale)
    matrix[:, 2] += (np.array(size[::-1]) - 1) / 2 - center + shift
    return matrix


def _share_in_frame(points: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> float:
    """Fraction of points (n, 2) that `matrix` moves into an image of `size`; 1 without points."""
    if len(points) == 0:
        return 1.0
    moved = points @ matrix[:, :2].T + matrix[:, 2]
    inside = (moved >= -0.5) & (moved < np.array(size[::-1]) - 0.5)
    return float(inside.all(axis=1).mean())


def warp(cut_out: np.ndarray, matrix: np.ndarray, size: tuple[int, int], scale: float) -> np.ndarray:
    """Warp without aliasing: a cut-out that shrinks is first averaged down to its final scale."""
    height, width = cut_out.shape[:2]
    if scale < 1:
        small_size = max(1, round(height * scale)), max(1, round(width * scale))
        ratio = np.array([width / small_size[1], height / small_size[0]])  # old pixels per new one, (x, y)
        cut_out = resize_area(cut_out, small_size)
        # The center of a small pixel x lies at (x + 0.5) * ratio - 0.5 in the old image.
        offset = matrix[:, :2] @ (0.5 * ratio - 0.5) + matrix[:, 2]
        matrix = np.column_stack([matrix[:, :2] * ratio, offset])
    else:
        cut_out = cut_out.copy()
    # Outside the photo the colors continue and the mask is 0: repeat a border with a mask of 0.
    cut_out[[0, -1], :, 3] = 0
    cut_out[:, [0, -1], 3] = 0
    return cv2.warpAffine(cut_out, matrix, size[::-1], borderMode=cv2.BORDER_REPLICATE)


def random_crop(image: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Crop a random part of an image (H, W, C) with the proportions of `size`, and resize it to `size`.

    The sides of the part are 40 % to 100 % of the largest part with these proportions.
    """
    height, width = image.shape[:2]
    largest = min(height / size[0], width / size[1])
    scale = largest * rng.uniform(MIN_CROP, 1.0)
    crop_h, crop_w = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
    top, left = rng.integers(height - crop_h + 1), rng.integers(width - crop_w + 1)
    return resize_area(image[top : top + crop_h, left : left + crop_w], size)


def zoom(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Crop a random part of an image (H, W, C), with sides of 60 % to 100 % of the whole; returns a view."""
    scale = rng.uniform(MIN_ZOOM, 1.0)
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    top = rng.integers(image.shape[0] - height + 1)
    left = rng.integers(image.shape[1] - width + 1)
    return image[top : top + height, left : left + width]
