"""From folders to batches: pair photos with masks, cut out, composite, augment, draw prompts, load.

Images are RGB uint8 (H, W, 3). A mask file is read as bool (H, W); from there on a mask is soft, so
that thin cables survive being resized: float32 (H, W) in 0..1, or uint8 in 0..255 as the fourth channel
of a picture (H, W, 4). Every random choice comes from a generator made of (seed, epoch, slot), never
from global state.
"""

import hashlib
import io
import signal
import struct
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Subset

from cache import DecodedFiles
from config import DatasetConfig

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
PROMPTS = ("none", "point", "box", "mixed")


# --- Files ------------------------------------------------------------------------------------


class FileFault(ValueError):
    """A file cannot be read or is not what is expected; the message names it."""


@dataclass(frozen=True)
class Pair:
    """A photo and its mask file."""

    image_path: Path
    mask_path: Path


@dataclass(frozen=True)
class Facts:
    """What the check at the start saw of a file: the (h, w) of its picture and a hash of the pixels."""

    size: tuple[int, int]
    digest: str


@dataclass(frozen=True)
class Source:
    """One dataset of the config with its files found, and what was seen of each."""

    config: DatasetConfig
    pairs: tuple[Pair, ...]
    backgrounds: tuple[Path, ...]
    facts: dict[Path, Facts]

    @property
    def is_constant(self) -> bool:
        """Whether its samples are the same in every epoch: photos, neither composited nor augmented."""
        return not self.config.composites and not self.config.w_aug


def read_image(path: Path) -> np.ndarray:
    """An image file as RGB uint8 (H, W, 3), turned upright as its EXIF says.

    Raises FileFault if it cannot be decoded whole or has more than 8 bits.
    """
    return np.asarray(_open(path).convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """A mask file as bool (H, W): in a JPEG above 127, else above half of the file's maximum.

    Of a colour file each pixel's largest channel counts. Raises FileFault if it
    cannot be decoded whole, has more than 8 bits, or has many values between its two ends.
    """
    image = _open(path)
    if image.mode in ("1", "L"):
        values = np.asarray(image.convert("L"))
    else:
        values = np.asarray(image.convert("RGB")).max(axis=2)
    top = 255 if image.format in ("JPEG", "MPO") else max(int(values.max()), 1)
    _check_binary(values, top, path)
    return values > top / 2


# A smooth edge puts few of a mask's pixels in the middle of its range; a label map, a photo or a
# map of probabilities puts many there.
MAX_MIDDLE_SHARE = 0.25


def _check_binary(values: np.ndarray, top: int, path: Path) -> None:
    above = np.count_nonzero(values > 0.25 * top)
    middle = above - np.count_nonzero(values > 0.75 * top)
    if middle > MAX_MIDDLE_SHARE * above:
        raise FileFault(
            f"{path}: not a binary mask, {100 * middle / above:.0f} % of its foreground has values "
            f"from {0.25 * top:.0f} to {0.75 * top:.0f}; expected two values such as 0 and 255"
        )


# Pictures above it are refused before they are decoded: a few kilobytes can claim to be gigabytes.
MAX_PIXELS = 100_000_000
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is lower than what --max_pixels may allow


def check_size(path: Path, max_pixels: int = MAX_PIXELS) -> None:
    """Raise FileFault if its header is no picture's or claims too many pixels."""
    with _decoding(path), Image.open(path) as image:
        width, height = image.size
    if height * width > max_pixels:
        raise FileFault(f"{path}: has {height} x {width} pixels, more than --max_pixels {max_pixels}")


def _open(path: Path) -> Image.Image:
    with _decoding(path), Image.open(path) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format
    if upright.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise FileFault(f"{path}: expected 8-bit grey or colour, got Pillow's mode {upright.mode!r}")
    return upright


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn all that Pillow raises for files that are no pictures into a FileFault."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise OSError("not a file")
        yield
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise FileFault(f"{path}: cannot be decoded ({error})") from error


def find_sources(configs: list[DatasetConfig], *, max_pixels: int = MAX_PIXELS) -> list[Source]:
    """Find the files of every dataset and read each once.

    Raises one ValueError that lists what is wrong in all of them (the first 10 and the count):
    empty folders, unmatched or duplicate stems, undecodable or huge files, size mismatches, masks that
    are not binary.
    """
    faults = []
    found = []
    for config in configs:
        pairs = _find_pairs(config.data_dir, faults)
        backgrounds = []
        for folder in config.bg_paths:
            files = _image_files(folder)
            if not files:
                faults.append(f"{folder}: no .png, .jpg or .jpeg file in it")
            backgrounds += files
        found.append((config, tuple(pairs), tuple(backgrounds)))
    items = dict.fromkeys(item for _, pairs, backgrounds in found for item in (*pairs, *backgrounds))
    facts = {}
    with ThreadPoolExecutor() as pool:
        for fault, facts_of_item in pool.map(partial(_check, max_pixels=max_pixels), items):
            faults += [fault] if fault else []
            facts |= facts_of_item
    if faults:
        raise ValueError(f"{len(faults)} problem(s) in the data:\n  {listed(faults)}")
    return [
        Source(config, pairs, backgrounds, {path: facts[path] for path in _files(pairs, backgrounds)})
        for config, pairs, backgrounds in found
    ]


def listed(items: list[str]) -> str:
    """The first 10 of a list, one a line, and how many more there are."""
    more = [f"... and {len(items) - 10} more"] if len(items) > 10 else []
    return "\n  ".join([*items[:10], *more])


def _files(pairs: Iterable[Pair], backgrounds: Iterable[Path]) -> Iterator[Path]:
    for pair in pairs:
        yield from (pair.image_path, pair.mask_path)
    yield from backgrounds


def leaks(train: list[Source], test: Source) -> list[tuple[Path, Path]]:
    """Photos (test, train) whose pixels are the same, so that testing on them would measure memory."""
    seen = {s.facts[pair.image_path].digest: pair.image_path for s in train for pair in s.pairs}
    photos = [pair.image_path for pair in test.pairs]
    digests = ((path, test.facts[path].digest) for path in photos)
    return [(path, seen[digest]) for path, digest in digests if digest in seen]


def _find_pairs(data_dir: Path, faults: list[str]) -> list[Pair]:
    by_stem = []
    for folder in (data_dir / "imgs", data_dir / "masks"):
        if not folder.is_dir():
            faults.append(f"{folder}: no such folder (expected imgs/ and masks/ in {data_dir})")
            return []
        stems = {}
        for path in _image_files(folder):
            if path.stem in stems:
                faults.append(f"{path}: has the same stem as {stems[path.stem].name}")
            stems[path.stem] = path
        if not stems:
            faults.append(f"{folder}: no .png, .jpg or .jpeg file in it")
            return []
        by_stem.append(stems)
    images, masks = by_stem
    faults += [f"{images[stem]}: has no mask in masks/" for stem in sorted(images.keys() - masks.keys())]
    faults += [f"{masks[stem]}: has no photo in imgs/" for stem in sorted(masks.keys() - images.keys())]
    return [Pair(images[stem], masks[stem]) for stem in sorted(images.keys() & masks.keys())]


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _check(item: Pair | Path, max_pixels: int) -> tuple[str | None, dict[Path, Facts]]:
    """What is wrong with a pair or a background, or None; and what was seen of its files."""
    readers = {item: read_image}
    if isinstance(item, Pair):
        readers = {item.image_path: read_image, item.mask_path: read_mask}
    arrays = {}
    try:
        for path, read in readers.items():
            check_size(path, max_pixels)
            arrays[path] = read(path)
    except FileFault as error:
        return str(error), {}
    if isinstance(item, Pair):
        size, mask_size = arrays[item.image_path].shape[:2], arrays[item.mask_path].shape
        if size != mask_size:
            fault = f"is {size[0]} x {size[1]} (h x w) but its mask is {mask_size[0]} x {mask_size[1]}"
            return f"{item.image_path}: {fault}", {}
    return None, {path: _facts(array) for path, array in arrays.items()}


def _facts(array: np.ndarray) -> Facts:
    pixels = hashlib.blake2b(np.ascontiguousarray(array), digest_size=16)
    pixels.update(repr(array.shape).encode())
    return Facts(array.shape[:2], pixels.hexdigest())


# --- Sizes ------------------------------------------------------------------------------------


def fit_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """`size` (h, w) scaled so that its longest side is `longest`, rounded as SAM does."""
    scale = longest / max(size)
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize to (h, w) exactly as `SamPredictor` does (Pillow's antialiased bilinear filter)."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a uint8 picture of any channels to (h, w), fast: by area averaging if it shrinks."""
    shrinks = image.shape[0] > size[0] or image.shape[1] > size[1]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a soft mask to (h, w) by area averaging, which keeps a thin cable's total area."""
    if mask.shape == size:
        return mask
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_AREA)


def to_u8(mask: np.ndarray) -> np.ndarray:
    """A soft mask in 0..1 as uint8 in 0..255."""
    return np.rint(mask * 255).astype(np.uint8)


def pad_to_square(array: np.ndarray, side: int) -> np.ndarray:
    """A copy padded with zeros at the bottom and right to (side, side, ...)."""
    square = np.zeros((side, side, *array.shape[2:]), array.dtype)
    square[: array.shape[0], : array.shape[1]] = array
    return square


# --- Reading for training ---------------------------------------------------------------------
# What the data workers keep decoded: functions of a file and of the longest side to keep, since
# cutting out costs time by the pixel, and a phone has ten times more of them than a model sees.


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


# --- Compositing ------------------------------------------------------------------------------

# How far inside the mask, in pixels, a cable's colour is trusted to be the cable's own.
TRUSTED_DEPTH = 2.0


def cut_out(image_and_mask: np.ndarray) -> np.ndarray:
    """Cut the cables of a photo out, with a soft edge and no trace of the old background.

    A photo's edge pixels mix cable and background, and masks are rarely exact to the pixel. Pasted
    as they are, they leave a halo from which a model learns to see the pasting. So every pixel
    outside the cables' core takes the colour of the nearest core pixel; the mask's edge is smoothed.

    Args:
        image_and_mask: uint8 (H, W, 4).

    Returns:
        uint8 (H, W, 4): cable colours spread everywhere, and the soft mask.
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
    colour_of_label = np.zeros((labels.max() + 1, 3), np.uint8)
    colour_of_label[labels[core]] = image[core]
    return cv2.merge([colour_of_label[labels], cv2.GaussianBlur(mask, (0, 0), 0.7)])


def paste(
    cut_out: np.ndarray,
    image: np.ndarray,
    mask: np.ndarray,
    recolour: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:
    """Blend a cut-out into an image by its soft mask, and add that to the image's mask, in place.

    Only the pixels that the cables touch are computed, a few in a hundred; `recolour` changes their
    colours first. `cut_out` uint8 (H, W, 4), `image` uint8 (H, W, 3), `mask` float32 (H, W) in 0..1.
    """
    touched = np.flatnonzero(cut_out[..., 3])
    if len(touched) == 0:
        return
    cables = cut_out.reshape(-1, 4)[touched]
    colours = np.ascontiguousarray(cables[:, None, :3])  # (n, 1, 3), a picture for OpenCV
    colours = (recolour(colours) if recolour else colours)[:, 0].astype(np.float32)
    alpha = cables[:, 3:].astype(np.float32) / 255
    image_pixels, mask_pixels = image.reshape(-1, 3), mask.reshape(-1)  # views
    below = image_pixels[touched]
    image_pixels[touched] = np.rint(below + (colours - below) * alpha)
    mask_pixels[touched] = 1 - (1 - mask_pixels[touched]) * (1 - alpha[:, 0])


def composite(
    source: Source,
    pair_index: int,
    canvas: tuple[int, int],
    rng: np.random.Generator,
    read: Callable[..., np.ndarray] = _read_anew,
) -> tuple[np.ndarray, np.ndarray]:
    """Paste a pair's cables on a random background: image uint8 and soft mask of size `canvas`.

    `read(load, item, longest)` returns what `load(item, longest)` does, from a cache perhaps.
    """
    augmented, longest = source.config.w_aug, longest_side(canvas)
    background = read(load_background, source.backgrounds[rng.integers(len(source.backgrounds))], longest)
    image = random_crop(background, canvas, rng)
    mask = np.zeros(canvas, np.float32)
    if not augmented:
        paste(resize(read(load_cut_out, source.pairs[pair_index], longest), canvas), image, mask)
        return image, mask
    image = recolour_scene(flip(image, rng), rng)
    if rng.random() < CLUTTER:
        image = add_clutter(image, rng)
    indices = [pair_index]
    if rng.random() < SECOND_CUT_OUT:
        indices.insert(0, int(rng.integers(len(source.pairs))))
    for index in indices:
        cables = move(flip(read(load_cut_out, source.pairs[index], longest), rng), canvas, rng)
        if rng.random() < SHADOW:
            cast_shadow(cables, image, rng)
        paste(cables, image, mask, partial(recolour_cables, rng=rng))
    return degrade(image, rng), mask


# --- Augmentation -----------------------------------------------------------------------------

SECOND_CUT_OUT = 0.3  # probability
CLUTTER = 0.5  # probability
SHADOW = 0.5  # probability
SCALE = (0.6, 1.6)  # relative to the whole photo filling the canvas
SHIFT = 0.3  # of the canvas side, to either direction
MIN_IN_FRAME = 0.25  # of the cables' pixels
NORMAL_QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy mirrored left-right and top-bottom, each half of the time."""
    code = (None, 0, 1, -1)[rng.integers(4)]
    return image.copy() if code is None else cv2.flip(image, code)


def move(cut_out: np.ndarray, canvas: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
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
    else:  # far off-centre cables: as they were in the photo
        scale, matrix = fit, _similarity(size, canvas, fit, 0.0, np.zeros(2))
    return _warp(cut_out, matrix, canvas, scale)


def _similarity(
    size: tuple[int, int], canvas: tuple[int, int], scale: float, angle: float, shift: np.ndarray
) -> np.ndarray:
    """The 2 x 3 matrix that scales and turns about the centre and moves it to the canvas's centre."""
    centre = (np.array(size[::-1]) - 1) / 2
    matrix = cv2.getRotationMatrix2D(centre, angle, scale)
    matrix[:, 2] += (np.array(canvas[::-1]) - 1) / 2 - centre + shift
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
        cut_out = resize(cut_out, shrunk)
        # Pixel centres of the shrunk picture in coordinates of the old one: (x + 0.5) * ratio - 0.5.
        offset = matrix[:, :2] @ (0.5 * ratio - 0.5) + matrix[:, 2]
        matrix = np.column_stack([matrix[:, :2] * ratio, offset])
    # Outside, colours go on and the mask is 0: a transparent rim to repeat, with no dark edge.
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
    return resize(image[top : top + crop_h, left : left + crop_w], canvas)


def recolour_cables(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Any hue, from grey to vivid, from dark to bright: cables come in every colour."""
    return _shift_hsv(
        image,
        hue=rng.uniform(0, 180),
        saturation=(rng.uniform(0.3, 1.5), rng.uniform(-20, 60)),
        gamma=np.exp(rng.uniform(-0.7, 0.7)),
    )


def recolour_scene(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mild changes of hue, saturation and brightness of a background or a whole photo."""
    return _shift_hsv(
        image,
        hue=rng.uniform(-15, 15),
        saturation=(rng.uniform(0.6, 1.4), 0.0),
        gamma=np.exp(rng.uniform(-0.4, 0.4)),
    )


def _shift_hsv(image: np.ndarray, *, hue: float, saturation: tuple[float, float], gamma: float) -> np.ndarray:
    """Shift the hue (in OpenCV's half degrees), scale and offset saturation, bend brightness."""
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


def add_clutter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw 1 to 6 things with edges that are no cable's: boxes, strips along the frame, text, keys."""
    draw = (_draw_box, _draw_strip, _draw_text, _draw_keys)
    for _ in range(rng.integers(1, 7)):
        layer = image.copy()
        draw[rng.integers(len(draw))](layer, rng.integers(0, 256, 3).tolist(), rng)
        opacity = rng.uniform(0.5, 1)
        image = cv2.addWeighted(layer, opacity, image, 1 - opacity, 0)
    return image


def _draw_box(layer: np.ndarray, colour: list[int], rng: np.random.Generator) -> None:
    sides = np.exp(rng.uniform(*np.log((0.02, 0.5)), 2)) * max(layer.shape)
    _fill_box(layer, _random_point(layer, rng), sides, rng.uniform(-180, 180), colour)


def _draw_strip(layer: np.ndarray, colour: list[int], rng: np.random.Generator) -> None:
    width = 1 + int(rng.uniform(0.01, 0.1) * max(layer.shape))
    layer[(np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:])[rng.integers(4)]] = colour


def _draw_text(layer: np.ndarray, colour: list[int], rng: np.random.Generator) -> None:
    text = "".join(map(chr, rng.integers(33, 127, rng.integers(2, 12))))
    scale = np.exp(rng.uniform(*np.log((0.3, 3)))) * max(layer.shape) / 256
    start = _random_point(layer, rng) - (0.3 * layer.shape[1], 0)
    width = max(1, int(scale * rng.uniform(1, 3)))
    font = int(rng.integers(5))  # OpenCV's upright ones
    cv2.putText(layer, text, start.astype(int).tolist(), font, scale, colour, width, cv2.LINE_AA)


def _draw_keys(layer: np.ndarray, colour: list[int], rng: np.random.Generator) -> None:
    pitch, angle = rng.uniform(0.03, 0.1) * max(layer.shape), rng.uniform(-180, 180)
    steps = pitch * cv2.getRotationMatrix2D((0, 0), -angle, 1.0)[:, :2].T  # along a row, to the next one
    corner, rows, columns = _random_point(layer, rng), rng.integers(2, 6), rng.integers(2, 8)
    for row, column in np.ndindex(rows, columns):
        centre = corner + (column - columns / 2) * steps[0] + (row - rows / 2) * steps[1]
        _fill_box(layer, centre, (0.8 * pitch, 0.8 * pitch), angle, colour)


def _random_point(layer: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0, 1, 2) * layer.shape[1::-1]


def _fill_box(layer, centre, sides, angle, colour) -> None:
    """A filled rectangle, turned by `angle` degrees, with smooth edges."""
    corners = cv2.boxPoints((tuple(centre), tuple(sides), angle))
    cv2.fillPoly(layer, [np.rint(corners * 8).astype(np.int32)], colour, cv2.LINE_AA, shift=3)


def cast_shadow(cut_out: np.ndarray, image: np.ndarray, rng: np.random.Generator) -> None:
    """Darken an image (H, W, 3), in place, beside where cables (H, W, 4) will lie on it."""
    height, width = image.shape[:2]
    unit = max(height, width) / 256
    shift = np.column_stack([np.eye(2), unit * rng.uniform(-5, 5, 2)])
    shadow = cv2.warpAffine(cut_out[..., 3], shift, (width, height))
    shadow = cv2.GaussianBlur(shadow, (0, 0), unit * rng.uniform(0.7, 4)).astype(np.float32)
    np.rint(image * (1 - rng.uniform(0.2, 0.7) / 255 * shadow[..., None]), out=image, casting="unsafe")


def degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a camera adds: brightness and contrast, and sometimes blur, noise, JPEG artefacts."""
    levels = np.arange(256) * rng.uniform(0.75, 1.25) + rng.uniform(-25, 25)
    image = cv2.LUT(image, np.clip(levels, 0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.2))
    if rng.random() < 0.3:
        # Random bytes through a table of quantiles: many times faster than normal numbers.
        table = np.rint(NORMAL_QUANTILES * rng.uniform(2, 10)).astype(np.int16)
        noise = table[rng.integers(256, size=image.shape, dtype=np.uint8)]
        image = cv2.add(image, noise, dtype=cv2.CV_8U)
    if rng.random() < 0.3:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(rng.integers(30, 90)))
        image = np.asarray(Image.open(buffer))
    return image


def zoom(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random part of a picture, with sides from 60 % to all of the whole."""
    share = rng.uniform(0.6, 1.0)
    height, width = (max(1, round(side * share)) for side in image.shape[:2])
    top = rng.integers(image.shape[0] - height + 1)
    left = rng.integers(image.shape[1] - width + 1)
    return image[top : top + height, left : left + width]


def photo(
    source: Source,
    pair_index: int,
    canvas: tuple[int, int],
    rng: np.random.Generator,
    read: Callable[..., np.ndarray] = _read_anew,
) -> tuple[np.ndarray, np.ndarray]:
    """A photo that is used as it is: image uint8 and soft mask of size `canvas`; see `composite`."""
    pair = source.pairs[pair_index]
    if not source.config.w_aug:
        image, mask = read_image(pair.image_path), read_mask(pair.mask_path).astype(np.float32)
        return resize_image(image, canvas), resize_mask(mask, canvas)
    part = resize(zoom(flip(read(load_pair, pair, longest_side(canvas)), rng), rng), canvas)
    image = degrade(recolour_scene(np.ascontiguousarray(part[..., :3]), rng), rng)
    return image, part[..., 3].astype(np.float32) / 255


# --- Prompts ----------------------------------------------------------------------------------

BOX_JITTER = 0.05  # of the box's side
PROMPT_TOKENS = {"none": 0, "point": 4, "box": 2, "mixed": 4}
# Labels as `model.decode` takes them.
ABSENT, NOT_A_POINT, FOREGROUND_POINT, BOX_CORNERS = -2, -1, 1, (2, 3)


def draw_prompt(
    kind: str, target: np.ndarray, size: tuple[int, int], img_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a prompt for a mask: 1 to 3 points on the cables, their box (jittered), or none.

    Args:
        kind: one of PROMPTS; "mixed" is one of the other three.
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
        centres = (np.column_stack([columns, rows])[rng.integers(len(rows), size=count)] + 0.5) * cell - 0.5
        points[:count] = np.minimum(centres, last)
        labels[:count] = FOREGROUND_POINT
        labels[count] = NOT_A_POINT
    else:
        low = np.array([columns.min(), rows.min()], np.float32) * cell
        high = np.array([columns.max() + 1, rows.max() + 1], np.float32) * cell - 1
        jitter = rng.uniform(-BOX_JITTER, BOX_JITTER, (2, 2)) * (high - low + 1)
        points[:2] = np.clip(np.stack([low, high]) + jitter, 0, last)
        labels[:2] = BOX_CORNERS
    return points, labels


# --- Datasets ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """What a model takes: `img_size` is the side of its square input, `grid` that of the targets."""

    img_size: int
    grid: int

    @property
    def finest(self) -> int:
        """The longest side of what samples are made of."""
        return max(self.img_size, self.grid)


def make_rng(seed: int, *key: int) -> np.random.Generator:
    """An independent generator for each (seed, key)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


# First part of every generator's key: what the generator is for.
PLAN, TRAIN, TEST, PROMPT = range(4)


def epoch_plan(sources: list[Source], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs one epoch uses, and in which order.

    Of each dataset `round(percentage * n_pairs)` samples (at least 1): whole passes, plus a subset
    drawn anew each epoch in which no pair occurs twice.

    Returns:
        int (n, 2) rows of (source, pair), one per slot of the epoch, and a permutation of the slots.
    """
    rng = make_rng(seed, PLAN, epoch)
    rows = []
    for number, source in enumerate(sources):
        n_pairs = len(source.pairs)
        passes, rest = divmod(max(1, round(source.config.percentage * n_pairs)), n_pairs)
        drawn = np.concatenate([np.tile(np.arange(n_pairs), passes), rng.permutation(n_pairs)[:rest]])
        rows.append(np.column_stack([np.full(len(drawn), number), drawn]))
    rows = np.concatenate(rows)
    return rows, rng.permutation(len(rows))


def make_sample(
    source: Source,
    pair_index: int,
    canvas: tuple[int, int],
    rng: np.random.Generator,
    read: Callable[..., np.ndarray] = _read_anew,
) -> tuple[np.ndarray, np.ndarray]:
    """A composite or a photo as the dataset's config says: image uint8 and soft mask."""
    make = composite if source.config.composites else photo
    return make(source, pair_index, canvas, rng, read)


def model_input(image: np.ndarray, mask: np.ndarray, frame: Frame) -> dict[str, torch.Tensor]:
    """Bring an image and its soft mask to the model's frame.

    Returns:
        image: uint8 (S, S, 3), longest side S = img_size, padded at the bottom and right.
        size: int64 (2,), the (h, w) of the picture in it.
        target: uint8 (1, grid, grid), 255 times the mask averaged over the cells of the grid.
    """
    size = fit_size(mask.shape, frame.img_size)
    mask = resize_mask(mask, fit_size(mask.shape, frame.finest))
    target = resize_mask(pad_to_square(mask, frame.finest), (frame.grid, frame.grid))
    return {
        "image": torch.from_numpy(pad_to_square(resize_image(image, size), frame.img_size)),
        "size": torch.tensor(size),
        "target": torch.from_numpy(to_u8(target))[None],
    }


@dataclass(frozen=True)
class Use:
    """One use of a sample in training.

    The sample is that of `slot` in the epoch it was `born` in, which chose its `source`, its `pair`
    and its augmentation. `epoch` uses it, with a prompt of its own. `place` is where its embedding is
    kept for later epochs, or None.
    """

    epoch: int
    slot: int
    born: int
    source: int
    pair: int
    place: int | None


RETRY_AFTER = 1.0  # seconds: long enough for a network disk that hiccups


class UnreadableFile(Exception):
    """A file has gone bad since the check at the start; the message names it.

    A loader passes an exception of a worker on with the worker's traceback as its message, of which this
    keeps the end.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().rpartition("dataset.UnreadableFile: ")[2])


def _twice(make: Callable, key: Hashable) -> Any:
    """`make(key)`, tried once again if a file cannot be read any more; then raises UnreadableFile."""
    try:
        return make(key)
    except FileFault:
        time.sleep(RETRY_AFTER)
    try:
        return make(key)
    except FileFault as error:
        raise UnreadableFile(f"{error}; it was intact when the run began") from error


class TrainSet(Dataset):
    """Training samples, each a function of (seed, epoch, slot) alone; keys are of type `Use`.

    Args:
        reuse: epochs in which a composite or an augmented photo is used before it is made anew.
        keep_photos: whether to keep the embeddings of photos that are neither, in all epochs the same.
        cache_bytes: memory for decoded files.
    """

    def __init__(
        self,
        sources: list[Source],
        *,
        frame: Frame,
        prompt: str,
        seed: int,
        reuse: int = 1,
        keep_photos: bool = False,
        cache_bytes: int = 0,
    ) -> None:
        self.sources, self.frame, self.prompt, self.seed, self.reuse = sources, frame, prompt, seed, reuse
        rows, _ = epoch_plan(sources, seed, 0)
        self.epoch_length = len(rows)
        self.read = DecodedFiles(_shapes(sources, longest_side((frame.finest, 0))), cache_bytes)
        # Where each source's places begin: places of slots, or of pairs if its photos never change.
        self.first_slot, self.first_place, self.places = [], [], 0
        for number, source in enumerate(sources):
            self.first_slot.append(int(np.argmax(rows[:, 0] == number)))
            self.first_place.append(self.places)
            if source.is_constant:
                self.places += len(source.pairs) if keep_photos else 0
            elif reuse > 1:
                self.places += int(np.sum(rows[:, 0] == number))
        self.keep_photos = keep_photos

    def epoch(self, epoch: int) -> list[Use]:
        """The uses of one epoch, in order.

        The sample of a slot is made anew in every epoch with (epoch + slot) % reuse == 0.
        """
        plan, order = epoch_plan(self.sources, self.seed, epoch)
        born = np.maximum(0, epoch - (epoch + np.arange(len(plan))) % self.reuse)
        plans = {int(e): epoch_plan(self.sources, self.seed, int(e))[0] for e in np.unique(born)}
        return [self._use(epoch, int(slot), int(born[slot]), plan, plans) for slot in order]

    def _use(self, epoch: int, slot: int, born: int, plan: np.ndarray, plans: dict[int, np.ndarray]) -> Use:
        number = int(plan[slot, 0])
        if self.sources[number].is_constant:
            pair = int(plan[slot, 1])
            place = self.first_place[number] + pair if self.keep_photos else None
            return Use(epoch, slot, 0, number, pair, place)
        place = self.first_place[number] + slot - self.first_slot[number] if self.reuse > 1 else None
        return Use(epoch, slot, born, number, int(plans[born][slot, 1]), place)

    def batches(
        self, *, batch_size: int, epochs: int, start: int, part: int = 0, parts: int = 1
    ) -> Iterator[list[Use]]:
        """The batches of a whole run, epoch after epoch, without the first `start`, which are done.

        Of each batch only one of several parts, of about the same length (0 for some, it may be).
        """
        per_epoch = -(-self.epoch_length // batch_size)
        for epoch in range(start // per_epoch, epochs):
            uses = self.epoch(epoch)
            skipped = start - epoch * per_epoch if epoch == start // per_epoch else 0
            for batch in range(skipped, per_epoch):
                yield uses[batch * batch_size : (batch + 1) * batch_size][part::parts]

    def batches_to_make(
        self, *, batch_size: int, epochs: int, start: int, part: int = 0, parts: int = 1
    ) -> Iterator[list[Use]]:
        """The samples to make for `batches`, in the order of their first use, epoch by epoch.

        With nothing kept these are the very batches; else they hold only what is not in the pool.
        """
        born, made, epoch = {}, [], None
        span = {"batch_size": batch_size, "epochs": epochs, "start": start, "part": part, "parts": parts}
        for batch in filter(None, self.batches(**span)):
            if made and batch[0].epoch != epoch:
                yield made
                made = []
            epoch = batch[0].epoch
            for use in batch:
                if use.place is None or born.get(use.place) != use.born:
                    born[use.place] = use.born
                    made.append(use)
                if len(made) == -(-batch_size // parts):
                    yield made
                    made = []
        if made:
            yield made

    def __getitem__(self, use: Use) -> dict[str, torch.Tensor]:
        """A sample; raises UnreadableFile."""
        return _twice(self._make, use)

    def _make(self, use: Use) -> dict[str, torch.Tensor]:
        source = self.sources[use.source]
        rng = make_rng(self.seed, TRAIN, use.born, use.slot)
        canvas = fit_size(source.facts[source.pairs[use.pair].image_path].size, self.frame.finest)
        image, mask = make_sample(source, use.pair, canvas, rng, self.read)
        sample = model_input(image, mask, self.frame)
        return {**sample, **self.draw_prompt(use, sample["target"], sample["size"])}

    def draw_prompt(self, use: Use, target: torch.Tensor, size: torch.Tensor) -> dict[str, torch.Tensor]:
        """The prompt of one use, a function of (seed, epoch, slot): `points` (N, 2), `labels` (N,)."""
        rng = make_rng(self.seed, PROMPT, use.epoch, use.slot)
        return _prompt_tensors(self.prompt, target, size, self.frame, rng)


def _prompt_tensors(kind, target, size, frame, rng) -> dict[str, torch.Tensor]:
    points, labels = draw_prompt(kind, target[0].numpy(), tuple(size.tolist()), frame.img_size, rng)
    return {"points": torch.from_numpy(points), "labels": torch.from_numpy(labels)}


def _shapes(sources: list[Source], longest: int) -> dict[Hashable, tuple[int, ...]]:
    """Shapes of what is read for training, by (function, item), as `DecodedFiles` takes them."""
    shapes = {}
    for source in sources:
        if source.is_constant:
            continue
        load = load_cut_out if source.config.composites else load_pair
        for pair in source.pairs:
            shapes[load, pair] = (*_bounded_size(source.facts[pair.image_path].size, longest), 4)
        for path in source.backgrounds:
            shapes[load_background, path] = (*_bounded_size(source.facts[path].size, longest), 3)
    return shapes


class TestSet(Dataset):
    """Test samples, each a function of (seed, index) alone, with the truth at full resolution.

    With `percentage` below 1 a fixed subset; above 1 counts as 1.
    """

    __test__ = False  # not a pytest class

    def __init__(self, source: Source, *, frame: Frame, prompt: str, seed: int) -> None:
        self.source, self.frame, self.prompt, self.seed = source, frame, prompt, seed
        n_pairs = len(source.pairs)
        count = min(n_pairs, max(1, round(source.config.percentage * n_pairs)))
        self.pair_indices = np.sort(make_rng(seed, TEST).permutation(n_pairs)[:count])

    def __len__(self) -> int:
        return len(self.pair_indices)

    def __getitem__(self, index: int) -> dict:
        """A sample; raises UnreadableFile."""
        return _twice(self._make, index)

    def _make(self, index: int) -> dict:
        pair_index = self.pair_indices[index]
        rng = make_rng(self.seed, TEST, index)
        size = self.source.facts[self.source.pairs[pair_index].image_path].size
        image, mask = make_sample(self.source, pair_index, size, rng)
        sample = model_input(image, mask, self.frame)
        prompt = _prompt_tensors(self.prompt, sample["target"], sample["size"], self.frame, rng)
        return {**sample, **prompt, "picture": torch.tensor(image), "truth": torch.from_numpy(mask > 0.5)}


# --- Loaders ----------------------------------------------------------------------------------

# Workers that are forked see the memory of decoded files; those that are spawned do not.
WORKER_CONTEXT = "fork" if sys.platform == "linux" else None


def train_loader(train_set: TrainSet, *, num_workers: int, pin_memory: bool, **span: int) -> DataLoader:
    """One loader for the rest of a run: workers start once and prefetch on.

    It gives the batches of `TrainSet.batches_to_make(**span)`, once.
    """
    return DataLoader(
        train_set,
        batch_sampler=train_set.batches_to_make(**span),
        num_workers=num_workers,
        multiprocessing_context=WORKER_CONTEXT if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_init_worker,
    )


def test_loader(test_set: TestSet, *, num_workers: int, part: int, parts: int) -> DataLoader:
    """The test samples one by one, for their sizes differ, of one of several parts of the set."""
    samples = Subset(test_set, range(part, len(test_set), parts))
    return DataLoader(samples, batch_size=None, num_workers=num_workers, worker_init_fn=_init_worker)


def _init_worker(worker_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends the run
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)  # one process per core is parallel enough
