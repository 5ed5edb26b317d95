"""Image and mask files: reading, checking, pairing."""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from base.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}

# Larger images are refused before they are decoded: a file of a few kilobytes can claim gigabytes.
MAX_PIXELS = 100_000_000

# Pillow's modes with at most 8 bits per channel.
MODES_OF_8_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")

# Smooth edges put few pixels of a mask in the middle of its range. A label map, a photo or a map of
# probabilities puts many there.
MAX_MIDDLE_SHARE = 0.25

MAX_LISTED = 10  # items of a list that a message shows


class FileError(UserError):
    """A file cannot be read or is not what was expected. The message names the file."""


@dataclass(frozen=True)
class Pair:
    """An image file and its mask file."""

    image_path: Path
    mask_path: Path


@dataclass(frozen=True)
class FileInfo:
    """What `check_files` records of a file.

    size: (h, w) in pixels.
    digest: hash of the decoded pixels.
    """

    size: tuple[int, int]
    digest: str


# --- Reading -----------------------------------------------------------------------------------


def read_image(path: Path) -> np.ndarray:
    """Read an image file as RGB uint8 (H, W, 3), rotated upright by its EXIF orientation.

    Raises FileError if the file cannot be fully decoded or has more than 8 bits per channel.
    """
    return np.asarray(_open(path).convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """Read a mask file as bool (H, W).

    Foreground is above 127 in a JPEG file, and above half of the file's maximum in any other file. A
    color file is first reduced to the largest channel of each pixel.

    Raises FileError if the file cannot be fully decoded, has more than 8 bits per channel, or has too
    many values between background and foreground.
    """
    image = _open(path)
    if image.mode in ("1", "L"):
        values = np.asarray(image.convert("L"))
    else:
        values = np.asarray(image.convert("RGB")).max(axis=2)
    top = 255 if image.format in ("JPEG", "MPO") else max(int(values.max()), 1)
    _require_binary(values, top, path)
    return values > top / 2


def _require_binary(values: np.ndarray, top: int, path: Path) -> None:
    above = np.count_nonzero(values > 0.25 * top)
    middle = above - np.count_nonzero(values > 0.75 * top)
    if middle > MAX_MIDDLE_SHARE * above:
        raise FileError(
            f"{path}: not a binary mask, {100 * middle / above:.0f} % of its foreground has values "
            f"from {0.25 * top:.0f} to {0.75 * top:.0f}; expected two values such as 0 and 255"
        )


def check_size(path: Path, max_pixels: int = MAX_PIXELS) -> None:
    """Raise FileError if the header is not that of an image, or claims more than `max_pixels` pixels."""
    with _decoding(path), Image.open(path) as image:
        width, height = image.size
    if height * width > max_pixels:
        raise FileError(
            f"{path}: has {height} x {width} pixels, more than --max_pixels {max_pixels} "
            "(a flag of finetune.py, a fixed limit in predict.py)"
        )


def _open(path: Path) -> Image.Image:
    """Decode an image file of at most 8 bits per channel and rotate it upright; raises FileError."""
    with _decoding(path), Image.open(path) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format
    if upright.mode not in MODES_OF_8_BITS:
        raise FileError(f"{path}: expected 8-bit gray or color, got Pillow's mode {upright.mode!r}")
    return upright


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn everything that Pillow raises for a damaged file, or for another kind of file, into FileError."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait forever
            raise OSError("not a file")
        yield
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise FileError(f"{path}: cannot be decoded ({error})") from error


# --- Finding -----------------------------------------------------------------------------------


def image_files(folder: Path) -> list[Path]:
    """List the image files of a folder by their suffix, sorted; raises FileError if it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    except OSError as error:
        raise FileError(f"{folder}: cannot be listed ({error})") from error


def find_pairs(data_dir: Path) -> tuple[list[Pair], list[str]]:
    """Match the images in `data_dir/imgs` with the masks in `data_dir/masks` by their stems.

    Returns:
        The pairs, sorted by stem, and one message for each fault: a missing or empty folder, a second
        file with the same stem, an image without a mask, a mask without an image.
    """
    faults: list[str] = []
    by_stem = []
    for folder in (data_dir / "imgs", data_dir / "masks"):
        if not folder.is_dir():
            return [], [*faults, f"{folder}: no such folder (expected imgs/ and masks/ in {data_dir})"]
        paths: dict[str, Path] = {}
        for path in image_files(folder):
            if path.stem in paths:
                faults.append(f"{path}: has the same stem as {paths[path.stem].name}")
            paths[path.stem] = path
        if not paths:
            return [], [*faults, f"{folder}: no .png, .jpg or .jpeg file in it"]
        by_stem.append(paths)
    images, masks = by_stem
    faults += [f"{images[stem]}: has no mask in masks/" for stem in sorted(images.keys() - masks.keys())]
    faults += [f"{masks[stem]}: has no image in imgs/" for stem in sorted(masks.keys() - images.keys())]
    pairs = [Pair(images[stem], masks[stem]) for stem in sorted(images.keys() & masks.keys())]
    return pairs, faults


def files_of(pairs: Iterable[Pair], backgrounds: Iterable[Path]) -> Iterator[Path]:
    """Yield the files of a dataset: image and mask of each pair, then the backgrounds."""
    for pair in pairs:
        yield from (pair.image_path, pair.mask_path)
    yield from backgrounds


# --- Checking ----------------------------------------------------------------------------------


def check_files(
    items: Iterable[Pair | Path], max_pixels: int = MAX_PIXELS
) -> tuple[dict[Path, FileInfo], list[str]]:
    """Decode every file of the pairs and backgrounds once, in several threads.

    Returns:
        What was recorded of the files of each intact item, and one message for each item with a fault: a
        file that cannot be decoded or is too large, a mask that is not binary, a pair with two sizes.
    """
    infos: dict[Path, FileInfo] = {}
    faults: list[str] = []
    with ThreadPoolExecutor() as pool:
        for fault, item_infos in pool.map(partial(_check, max_pixels=max_pixels), dict.fromkeys(items)):
            infos |= item_infos
            if fault is not None:
                faults.append(fault)
    return infos, faults


def _check(item: Pair | Path, max_pixels: int) -> tuple[str | None, dict[Path, FileInfo]]:
    """Check one item of `check_files`: its fault or None, and what was recorded of its files."""
    readers: dict[Path, Callable[[Path], np.ndarray]]
    if isinstance(item, Pair):
        readers = {item.image_path: read_image, item.mask_path: read_mask}
    else:
        readers = {item: read_image}
    arrays = {}
    try:
        for path, read in readers.items():
            check_size(path, max_pixels)
            arrays[path] = read(path)
    except FileError as error:
        return str(error), {}
    if isinstance(item, Pair):
        (height, width), mask_size = arrays[item.image_path].shape[:2], arrays[item.mask_path].shape
        if (height, width) != mask_size:
            sizes = f"is {height} x {width} (h x w) but its mask is {mask_size[0]} x {mask_size[1]}"
            return f"{item.image_path}: {sizes}", {}
    return None, {path: _file_info(array) for path, array in arrays.items()}


def _file_info(array: np.ndarray) -> FileInfo:
    pixels = hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16)
    pixels.update(repr(array.shape).encode())
    return FileInfo((array.shape[0], array.shape[1]), pixels.hexdigest())


def format_list(items: Sequence[str]) -> str:
    """Join the first 10 items, one per line, and state how many more there are."""
    shown = list(items[:MAX_LISTED])
    if len(items) > MAX_LISTED:
        shown.append(f"... and {len(items) - MAX_LISTED} more")
    return "\n  ".join(shown)
