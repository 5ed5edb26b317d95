"""Image and mask files: read, check, pair."""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from base.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}


class FileError(UserError):
    """A file cannot be read or is not what is expected; the message names it."""


@dataclass(frozen=True)
class Pair:
    """A photo and its mask file."""

    image_path: Path
    mask_path: Path


@dataclass(frozen=True)
class FileInfo:
    """What the check at the start saw of a file: the (h, w) of its picture and a hash of the pixels."""

    size: tuple[int, int]
    digest: str


# --- Reading -----------------------------------------------------------------------------------


def read_image(path: Path) -> np.ndarray:
    """An image file as RGB uint8 (H, W, 3), turned upright as its EXIF says.

    Raises FileError if it cannot be decoded whole or has more than 8 bits.
    """
    return np.asarray(_open(path).convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """A mask file as bool (H, W): in a JPEG above 127, else above half of the file's maximum.

    Of a color file each pixel's largest channel counts. Raises FileError if it
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
        raise FileError(
            f"{path}: not a binary mask, {100 * middle / above:.0f} % of its foreground has values "
            f"from {0.25 * top:.0f} to {0.75 * top:.0f}; expected two values such as 0 and 255"
        )


# Pictures above it are refused before they are decoded: a few kilobytes can claim to be gigabytes.
MAX_PIXELS = 100_000_000


def check_size(path: Path, max_pixels: int = MAX_PIXELS) -> None:
    """Raise FileError if its header is no picture's or claims too many pixels."""
    with _decoding(path), Image.open(path) as image:
        width, height = image.size
    if height * width > max_pixels:
        raise FileError(f"{path}: has {height} x {width} pixels, more than --max_pixels {max_pixels}")


def _open(path: Path) -> Image.Image:
    with _decoding(path), Image.open(path) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format
    if upright.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise FileError(f"{path}: expected 8-bit gray or color, got Pillow's mode {upright.mode!r}")
    return upright


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn all that Pillow raises for files that are no pictures into a FileError."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise OSError("not a file")
        yield
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise FileError(f"{path}: cannot be decoded ({error})") from error


# --- Checking ----------------------------------------------------------------------------------


def format_list(items: list[str]) -> str:
    """The first 10 of a list, one a line, and how many more there are."""
    more = [f"... and {len(items) - 10} more"] if len(items) > 10 else []
    return "\n  ".join([*items[:10], *more])


def _files(pairs: Iterable[Pair], backgrounds: Iterable[Path]) -> Iterator[Path]:
    for pair in pairs:
        yield from (pair.image_path, pair.mask_path)
    yield from backgrounds


def find_pairs(data_dir: Path, faults: list[str]) -> list[Pair]:
    by_stem = []
    for folder in (data_dir / "imgs", data_dir / "masks"):
        if not folder.is_dir():
            faults.append(f"{folder}: no such folder (expected imgs/ and masks/ in {data_dir})")
            return []
        stems = {}
        for path in image_files(folder):
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


def image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _check(item: Pair | Path, max_pixels: int) -> tuple[str | None, dict[Path, FileInfo]]:
    """What is wrong with a pair or a background, or None; and what was seen of its files."""
    readers = {item: read_image}
    if isinstance(item, Pair):
        readers = {item.image_path: read_image, item.mask_path: read_mask}
    arrays = {}
    try:
        for path, read in readers.items():
            check_size(path, max_pixels)
            arrays[path] = read(path)
    except FileError as error:
        return str(error), {}
    if isinstance(item, Pair):
        size, mask_size = arrays[item.image_path].shape[:2], arrays[item.mask_path].shape
        if size != mask_size:
            fault = f"is {size[0]} x {size[1]} (h x w) but its mask is {mask_size[0]} x {mask_size[1]}"
            return f"{item.image_path}: {fault}", {}
    return None, {path: _file_info(array) for path, array in arrays.items()}


def _file_info(array: np.ndarray) -> FileInfo:
    pixels = hashlib.blake2b(np.ascontiguousarray(array), digest_size=16)
    pixels.update(repr(array.shape).encode())
    return FileInfo(array.shape[:2], pixels.hexdigest())
