"""Compositing: cut cables out by their masks, give them a look, transform them, paste them on backgrounds.

Sizes are (h, w). A soft mask is float32 (H, W) in 0..1, or uint8 in 0..255 where it is the fourth channel of
an image (H, W, 4). A cut-out is uint8 (H, W, 5): colors, soft mask, and the local radius of the cable in half
pixels. A layer is uint8 (H, W, 4): colors multiplied by the soft mask, and the soft mask.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from imaging.appearance import (
    Color,
    Light,
    Shading,
    cast_shadow,
    draw_color,
    draw_light,
    draw_shading,
    recolor,
    shade,
)
from imaging.augmentation import camera_degradation, flip, recolor_scene
from imaging.distractors import add_distractors, put_patch
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
    """Load the cables of an image as `cut_out` gives them: uint8 (H, W, 5), size as from `load_pair`."""
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

CUT_OUT_PROBABILITIES = (0.55, 0.3, 0.15)  # of one, two and three cut-outs in a composite
DISTRACTOR_PROBABILITY = 0.5
OCCLUDER_PROBABILITY = 0.15
RECOLOR_PHOTO_PROBABILITY = 0.5


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
        pairs: all pairs of the dataset; augmentation may add the cables of others.
        backgrounds: at least one file.
        pair_index: the pair whose cables are pasted.
        size: (h, w) of the sample.
        augment: if False, the cables keep their place and colors and the background its colors.
        read: `read(load, item, longest)` returns `load(item, longest)`, possibly from a cache.

    Returns the image, RGB uint8 (h, w, 3), and the soft mask, float32 (h, w), of all cables in it. Raises
    FileError.
    """

    def random_background() -> np.ndarray:
        path = backgrounds[int(rng.integers(len(backgrounds)))]
        return random_crop(read(load_background, path, longest_side(size)), size, rng)

    def cut_out_of(index: int) -> np.ndarray:
        return read(load_cut_out, pairs[index], longest_side(size))

    image, mask = random_background(), np.zeros(size, np.float32)
    if not augment:
        paste(premultiply(resize_area(cut_out_of(pair_index)[..., :4], size)), image, mask)
        return image, mask
    image = recolor_scene(flip(image, rng), rng)
    if rng.random() < DISTRACTOR_PROBABILITY:
        image = add_distractors(image, random_background(), rng)
    light = draw_light(image, rng)
    n_others = rng.choice(len(CUT_OUT_PROBABILITIES), p=CUT_OUT_PROBABILITIES)
    for index in (*rng.integers(len(pairs), size=n_others), pair_index):
        paste_augmented(cut_out_of(index), image, mask, light, rng)
    if rng.random() < OCCLUDER_PROBABILITY:
        mask *= 1 - put_patch(image, random_background(), rng)
    return camera_degradation(image, rng), mask


def paste_augmented(
    cut_out: np.ndarray, image: np.ndarray, mask: np.ndarray, light: Light, rng: np.random.Generator
) -> None:
    """Paste a cut-out uint8 (H, W, 5) at random places, with random looks; see `paste`."""
    cut_out, size = flip(cut_out, rng), (mask.shape[0], mask.shape[1])
    placements, relief = draw_placements(cut_out, size, rng), measure_relief(cut_out)
    for placement in placements:
        dressed = dress(cut_out, relief, draw_color(rng), draw_shading(rng), placement.turn_back(light))
        layer = warp(dressed, placement, size)
        cast_shadow(cv2.extractChannel(layer, 3), image, light)
        paste(layer, image, mask)


def photo_sample(
    pair: Pair,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    augment: bool,
    read: Read = load_directly,
) -> tuple[np.ndarray, np.ndarray]:
    """Use the photo of a pair as it is; or flipped, zoomed and recolored if `augment` is True.

    Half of the augmented photos get cables of another color, which keep the shading that they have.
    Arguments, returned arrays and errors are those of `composite`.
    """
    if not augment:
        whole, true_mask = read_pair(pair)
        return resize_image(whole, size), resize_mask(true_mask.astype(np.float32), size)
    image_and_mask = flip(read(load_pair, pair, longest_side(size)), rng)
    image_and_mask = np.ascontiguousarray(zoom(image_and_mask, rng))
    if rng.random() < RECOLOR_PHOTO_PROBABILITY:
        recolor_in_place(image_and_mask, draw_color(rng))
    image_and_mask = resize_area(image_and_mask, size)
    image = recolor_scene(np.ascontiguousarray(image_and_mask[..., :3]), rng)
    return camera_degradation(image, rng), image_and_mask[..., 3].astype(np.float32) / 255


# --- Cutting out -------------------------------------------------------------------------------

# Depth inside the mask, in pixels, from which a pixel shows the color of the cable alone.
TRUSTED_DEPTH = 2.0
FILL_BLUR = 1.5  # sigma in pixels, for the colors that are extended
WIDE_RADIUS = 2.5  # pixels, from which the blur of 1.4 pixels below leaves the width as it is
EDGE_GAIN = 1.8  # makes this blur's edge as sharp as that of the blur of 0.7 pixels


def cut_out(image_and_mask: np.ndarray) -> np.ndarray:
    """Cut the cables out of an image, with a soft edge and without traces of the old background.

    Pixels at the edge mix cable and background, and masks are rarely exact to the pixel. Pasted
    unchanged, these pixels would form a halo, and a model would learn to detect the pasting. So every
    pixel outside the core of the cables takes the color of the nearest core pixels, and the edge of the
    mask is smoothed.

    Args:
        image_and_mask: uint8 (H, W, 4).

    Returns:
        uint8 (H, W, 5): the colors of the cables, extended over the whole image; the soft mask; the radius
        of the nearest cable in half pixels. An image with an empty mask keeps its colors.
    """
    image, mask = image_and_mask[..., :3], image_and_mask[..., 3].copy()
    if not mask.any():
        return np.dstack([image_and_mask, mask])
    inside = mask >= min(128, mask.max())
    depth = _depth(inside)
    # A cable thinner than twice the trusted depth keeps its deepest pixels: the ridge.
    ridge = cv2.dilate(depth, np.ones((5, 5), np.uint8))
    core = inside & (depth >= np.minimum(TRUSTED_DEPTH, ridge))
    filled = _nearest(core, image)
    # Without the blur, enlarged cables would show the nearest pixels as a comb.
    colors = np.where(core[..., None], filled, cv2.GaussianBlur(filled, (0, 0), FILL_BLUR))
    radius = _radius(inside, depth)
    return np.dstack([colors, _soft_edge(mask, radius), radius])


def _soft_edge(mask: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Smooth the edge of a mask uint8 (H, W); wide cables also lose the steps of its pixels."""
    thin = cv2.GaussianBlur(mask, (0, 0), 0.7)
    wide = cv2.GaussianBlur(mask, (0, 0), 1.4).astype(np.float32)
    wide = np.clip(127.5 + EDGE_GAIN * (wide - 127.5), 0, 255).astype(np.uint8)
    return np.where(radius >= 2 * WIDE_RADIUS, wide, thin)


def _depth(inside: np.ndarray) -> np.ndarray:
    """The distance of each pixel of a mask, bool (H, W), from the nearest pixel outside: float32 (H, W)."""
    distance = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 5)
    # Without a pixel outside, OpenCV gives 1e38.
    depth: np.ndarray = np.minimum(distance, np.float32(sum(inside.shape)))
    return depth


# Along the center line, the depth of neighbors differs by less; across it, by at least 1.
RIDGE_TOLERANCE = 0.6


def _radius(inside: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """The radius of the cable at each pixel, uint8 (H, W) in half pixels: the depth of its center line."""
    ridge = inside & (depth > cv2.dilate(depth, np.ones((3, 3), np.uint8)) - RIDGE_TOLERANCE)
    half_pixels = np.clip(2 * depth - 1, 1, 255)  # the depth of a pixel next to the edge is 1, not 1/2
    return cv2.GaussianBlur(_nearest(ridge, half_pixels.astype(np.uint8)), (0, 0), FILL_BLUR)


def _nearest(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each pixel, the value (H, W, ...) at the nearest pixel of `known`, bool (H, W)."""
    _, labels = cv2.distanceTransformWithLabels(
        (~known).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    of_label = np.zeros((labels.max() + 1, *values.shape[2:]), values.dtype)
    of_label[labels[known]] = values[known]
    return of_label[labels]


# --- Color and pasting -------------------------------------------------------------------------


@dataclass(frozen=True)
class Relief:
    """The shape of the cables of a cut-out (H, W, 5), at the n pixels that they touch.

    touched: the indices (n,) of these pixels in the flat image.
    across: float32 (n,), 0 on the center line of the cable and 1 at its edge.
    normals: float32 (n, 2), unit vectors (x, y) away from the center line.
    """

    touched: np.ndarray
    across: np.ndarray
    normals: np.ndarray


def measure_relief(cut_out: np.ndarray) -> Relief:
    """Measure the relief of a cut-out uint8 (H, W, 5), which does not depend on color and light."""
    mask, radius = cv2.extractChannel(cut_out, 3), cv2.extractChannel(cut_out, 4)
    touched = np.flatnonzero(mask > 0)
    depth = _depth(mask > 127)
    depth = cv2.GaussianBlur(depth, (0, 0), 1)  # smooths the steps of the mask's pixels
    x, y = (cv2.Sobel(depth, cv2.CV_32F, *axis).take(touched) for axis in ((1, 0), (0, 1)))
    normals = -np.stack([x, y], axis=1) / np.maximum(np.sqrt(x * x + y * y), 1e-6)[:, None]
    across = np.clip(1 - (2 * depth.take(touched) - 1) / np.maximum(radius.take(touched), 1), 0, 1)
    return Relief(touched, across, normals)


def dress(
    cut_out: np.ndarray, relief: Relief, color: Color | None, shading: Shading, light: Light
) -> np.ndarray:
    """Give the cables of a cut-out uint8 (H, W, 5) a color and a shading; returns a layer (H, W, 4).

    `light` is in the frame of the cut-out. Only the pixels of the cables are computed.
    """
    pixels = cut_out.reshape(-1, 5).take(relief.touched, axis=0)[:, :4].copy()
    shaded = shade(recolor(pixels[:, :3], color), relief.across, relief.normals, shading, light)
    pixels[:, :3] = np.rint(shaded * (pixels[:, 3:] / np.float32(255)))
    layer = np.zeros(cut_out.shape[:2], np.uint32)  # faster to write than four uint8 per pixel
    layer.reshape(-1)[relief.touched] = pixels.view(np.uint32)[:, 0]
    return layer.view(np.uint8).reshape(*layer.shape, 4)


def premultiply(image_and_mask: np.ndarray) -> np.ndarray:
    """Multiply the colors of an image uint8 (H, W, 4) by its soft mask: a layer."""
    *colors, alpha = cv2.split(image_and_mask)
    share = cv2.LUT(alpha, np.arange(256, dtype=np.float32) / 255)
    return cv2.merge([*(cv2.multiply(color, share, dtype=cv2.CV_8U) for color in colors), alpha])


def paste(layer: np.ndarray, image: np.ndarray, mask: np.ndarray) -> None:
    """Blend a layer into an image and its soft mask into the mask of the image, both in place.

    Only the pixels that the cables touch are computed: a few percent of the image.

    Args:
        layer: uint8 (H, W, 4), colors multiplied by the soft mask.
        image: uint8 (H, W, 3), contiguous.
        mask: float32 (H, W) in 0..1, contiguous.
    """
    touched = np.flatnonzero(cv2.extractChannel(layer, 3) > 0)
    *colors, alpha = layer.reshape(-1, 4).take(touched, axis=0).T
    behind = 1 - alpha / np.float32(255)  # the share of what lies behind the cables
    image_pixels, mask_pixels = image.reshape(-1, 3), mask.reshape(-1)  # views
    for channel, color in enumerate(colors):  # NumPy indexes single values faster than rows of three
        blended = image_pixels[touched, channel] * behind + color
        image_pixels[touched, channel] = np.minimum(np.rint(blended), 255)
    mask_pixels[touched] = 1 - (1 - mask_pixels[touched]) * behind


def recolor_in_place(image_and_mask: np.ndarray, color: Color | None) -> None:
    """Give the cables of a photo uint8 (H, W, 4) another color, where they are, in place."""
    pixels = image_and_mask.reshape(-1, 4)
    touched = np.flatnonzero(pixels[:, 3] > 0)
    cables, alpha = pixels[touched, :3], pixels[touched, 3:].astype(np.float32) / 255
    pixels[touched, :3] = np.rint(cables + (recolor(cables, color) - cables) * alpha)


# --- Transforming ------------------------------------------------------------------------------

# Width of the median cable, drawn log-uniformly, in units of 1/256 of the sample's longest side.
WIDTH_RANGE = (1.5, 18.0)
SCALE_RANGE = (0.6, 3.5)  # limits of the scale; 1 fits the whole cut-out into the sample
MAX_MAGNIFICATION = 2.5  # pixels of the sample per pixel of the photo; more looks blurred
REFLECT_PROBABILITY = 0.4  # of cables that go on, mirrored, beyond their photo instead of ending there
BUNDLE_PROBABILITY = 0.2
BUNDLE_SIZES = (2, 4)  # smallest and largest number of parallel cables
BUNDLE_GAPS = (0.0, 2.5)  # between them, in units of 1/256 of the longest side
BEND_PROBABILITY = 0.5
MAX_BEND = 0.04  # largest typical displacement, as a fraction of the longest side
BEND_GRID = 4  # random displacements along each side

SHORT_SIDES = (0.56, 1.5)  # range of a composite's short side over its long side; above 1 counts as 1

MIN_CROP, MIN_ZOOM = 0.4, 0.6  # smallest side of a random part, as a fraction of the largest


@dataclass(frozen=True)
class Placement:
    """Where a cut-out goes in a sample.

    matrix: (2, 3), from the cut-out to the sample.
    scale: pixels of the sample per pixel of the cut-out.
    bend: float32 (h, w, 2), displacement (x, y) of each pixel of the sample; None bends nothing.
    border: OpenCV's border mode: what lies outside the cut-out.
    """

    matrix: np.ndarray
    scale: float
    bend: np.ndarray | None = None
    border: int = cv2.BORDER_CONSTANT

    def turn_back(self, light: Light) -> Light:
        """The light of the sample in the frame of the cut-out."""
        return replace(light, direction=self.matrix[:, :2].T @ light.direction / self.scale)


def draw_placements(cut_out: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> list[Placement]:
    """Draw where the cables of a cut-out uint8 (H, W, 5) go in a sample of `size`.

    A random pixel of the cables lands inside the frame. The scale gives the cables a random width. A bundle
    has several placements, parallel to each other; a cut-out without cables has none.
    """
    height, width = cut_out.shape[:2]
    cables = np.argwhere(cut_out[::2, ::2, 3] > 127)  # one pixel in four
    if len(cables) == 0:
        return []
    unit = max(size) / 256
    cable_width = float(np.median(cut_out[::2, ::2, 4][tuple(cables.T)]))  # half pixels of radius
    fit = min(size[0] / height, size[1] / width)
    scale = unit * np.exp(rng.uniform(*np.log(WIDTH_RANGE))) / cable_width
    scale = float(min(np.clip(scale, *(fit * np.array(SCALE_RANGE))), MAX_MAGNIFICATION))
    point = 2.0 * cables[rng.integers(len(cables))][::-1]  # (x, y)
    place = rng.uniform(0.1, 0.9, 2) * size[::-1]
    bend = draw_bend(size, rng) if rng.random() < BEND_PROBABILITY else None
    border = cv2.BORDER_REFLECT_101 if rng.random() < REFLECT_PROBABILITY else cv2.BORDER_CONSTANT
    count = int(rng.integers(*BUNDLE_SIZES, endpoint=True)) if rng.random() < BUNDLE_PROBABILITY else 1
    step = (cable_width * scale + rng.uniform(*BUNDLE_GAPS) * unit) * unit_vector(rng)
    matrix = similarity_matrix(point, place, scale, rng.uniform(-180, 180))
    shifts = (np.column_stack([np.zeros((2, 2)), number * step]) for number in range(count))
    return [Placement(matrix + shift, scale, bend, border) for shift in shifts]


def unit_vector(rng: np.random.Generator) -> np.ndarray:
    """A random direction (2,)."""
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([np.cos(angle), np.sin(angle)])


def draw_bend(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A smooth random displacement (x, y) of each pixel, float32 (h, w, 2)."""
    coarse = rng.normal(0, rng.uniform(0, MAX_BEND) * max(size), (BEND_GRID, BEND_GRID, 2))
    return cv2.resize(coarse.astype(np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)


def similarity_matrix(point: np.ndarray, place: np.ndarray, scale: float, angle: float) -> np.ndarray:
    """Matrix (2, 3) that scales and rotates (degrees) and brings `point` to `place`, both (x, y)."""
    matrix = cv2.getRotationMatrix2D((0, 0), angle, scale)
    matrix[:, 2] = place - matrix[:, :2] @ point
    return matrix


def warp(layer: np.ndarray, placement: Placement, size: tuple[int, int]) -> np.ndarray:
    """Bring a layer to its place in a sample of `size`, without aliasing.

    A layer that shrinks is first averaged down to its final scale.
    """
    matrix, (height, width) = placement.matrix, layer.shape[:2]
    if placement.scale < 1:
        small_size = max(1, round(height * placement.scale)), max(1, round(width * placement.scale))
        ratio = np.array([width / small_size[1], height / small_size[0]])  # old pixels per new one, (x, y)
        layer = resize_area(layer, small_size)
        # The center of a small pixel x lies at (x + 0.5) * ratio - 0.5 in the old image.
        offset = matrix[:, :2] @ (0.5 * ratio - 0.5) + matrix[:, 2]
        matrix = np.column_stack([matrix[:, :2] * ratio, offset])
    if placement.bend is None:
        return cv2.warpAffine(layer, matrix, size[::-1], borderMode=placement.border)
    back = cv2.invertAffineTransform(matrix)
    source = placement.bend.astype(np.float64)  # where each pixel of the sample comes from, (x, y)
    source[..., 0] += np.arange(size[1])
    source[..., 1] += np.arange(size[0])[:, None]
    x, y = cv2.split(cv2.transform(source, back).astype(np.float32))
    return cv2.remap(layer, x, y, cv2.INTER_LINEAR, borderMode=placement.border)


def draw_canvas(longest: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the size (h, w) of a composite: square half of the time, else up to 16:9 in either direction."""
    shortest = round(longest * min(1.0, rng.uniform(*SHORT_SIDES)))
    return (shortest, longest) if rng.random() < 0.5 else (longest, shortest)


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
