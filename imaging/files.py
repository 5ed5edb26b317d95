"""Image files: finding them in a folder, and reading them."""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from base.errors import UserError
from base.flag_types import MAX_PIXELS
from imaging.geometry import fit_size

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
NO_IMAGE_FILE = f"no {', '.join(IMAGE_SUFFIXES[:-1])} or {IMAGE_SUFFIXES[-1]} file in it"

# Pillow opens no other format. Some formats start other programs, such as Ghostscript for EPS. JPEG includes
# MPO, the JPEG with several images that phones write; its first image is read.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")

# How the files of these formats begin.
KNOWN_STARTS = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"II*\0", b"MM\0*", b"BM")

# How files of other kinds begin, or what they have at byte 4: often found under the name of an image.
OTHER_CONTENT = {
    b"%!PS": "EPS",
    b"%PDF": "PDF",
    b"GIF8": "GIF",
    b"8BPS": "a Photoshop file",
    b"DDS ": "DDS",
    b"ftypavif": "AVIF",
    b"ftyphei": "HEIC",
    b"ftypmif1": "HEIC",
    b"version https://git-lfs": "a Git LFS pointer, and the image is not downloaded",
    b"<": "a web page, SVG or XML",
}

# Pillow's modes with at most 8 bits per channel.
MODES_OF_8_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB")

# A JPEG image that is shrunk keeps at least this fraction of the longest side that is asked for. Samples ask
# for twice their side. They enlarge a photo up to 1 / 0.6 times and a cut-out up to 3.5 times: one pixel of
# the shrunk image becomes at most 3.5 / (2 * 0.85) = 2.1 pixels of the sample, and 2.5 are sharp enough.
MIN_DRAFT = 0.85

MAX_LISTED = 10  # items of a list that a message shows


class FileError(UserError):
    """A file cannot be read or is not what was expected. The message names the file."""


def format_list(items: Sequence[str]) -> str:
    """Join the first 10 items, one per line, and state how many more there are."""
    shown = list(items[:MAX_LISTED])
    if len(items) > MAX_LISTED:
        shown.append(f"... and {len(items) - MAX_LISTED} more")
    return "\n  ".join(shown)


def first_few(items: Sequence[object]) -> str:
    """The first 3 items in one line, and dots if there are more."""
    return ", ".join(map(str, items[:3])) + ", ..." * (len(items) > 3)


# --- Finding -----------------------------------------------------------------------------------


def image_files(folder: Path) -> list[Path]:
    """List the image files of a folder by their suffix, sorted; raises FileError if it cannot be read.

    Files whose name begins with a dot are ignored, such as the `._a.png` that macOS writes beside `a.png`.
    """
    return [path for path in _visible(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def unread_files(folder: Path) -> list[Path]:
    """List what `image_files` leaves out because of its suffix, sorted; raises FileError."""
    return [path for path in _visible(folder) if path.suffix.lower() not in IMAGE_SUFFIXES]


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise FileError(f"{folder}: cannot be listed ({error})") from error


# --- Reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodedFile:
    """A decoded image file.

    path: the file, for messages.
    image: the pixels in Pillow's mode of the file, rotated upright by the EXIF orientation.
    size: (h, w) of the upright image in the file; `image` may be smaller, see `decode`.
    orientation: the EXIF orientation in the file, 1 to 8; 1 means upright.
    is_lossy: whether its compression changes pixel values, as JPEG does.
    is_16_bit_color: whether the low bytes of its values were dropped, which Pillow does for 16-bit color.
    """

    path: Path
    image: Image.Image
    size: tuple[int, int]
    orientation: int
    is_lossy: bool
    is_16_bit_color: bool


def read_image(path: Path, longest: int | None = None) -> np.ndarray:
    """Read an image file as RGB uint8 (H, W, 3), rotated upright by its EXIF orientation.

    `longest` may shrink a JPEG image; see `decode`. Raises FileError if the file cannot be fully decoded, has
    more than 8 bits per channel, or has several frames or pages.
    """
    return to_rgb(decode(path, longest))


def to_rgb(file: DecodedFile) -> np.ndarray:
    """The pixels of a decoded file as RGB uint8 (H, W, 3); raises FileError for more than 8 bits."""
    if file.image.mode not in MODES_OF_8_BITS:
        raise FileError(f"{file.path}: expected 8-bit gray or color, got Pillow's mode {file.image.mode!r}")
    if file.is_16_bit_color:  # of cameras with 10 or 12 bits, the high bytes are nearly black
        raise FileError(
            f"{file.path}: expected 8-bit gray or color, got 16 bits per value; save it with 8 bits"
        )
    with decoding(file.path):
        return np.asarray(file.image.convert("RGB"))


def check_size(path: Path, max_pixels: int = MAX_PIXELS) -> int:
    """Return the number of pixels of an image, as its header claims it.

    Raises FileError if the header is not that of an image, or claims more than `max_pixels` pixels.
    """
    with decoding(path), Image.open(path, formats=FORMATS) as image:
        width, height = image.size
    if height * width > max_pixels:
        raise FileError(
            f"{path}: has {height} x {width} pixels, more than --max_pixels {max_pixels} "
            "(a flag of finetune.py and predict.py, a fixed limit elsewhere)"
        )
    return height * width


def read_size(path: Path) -> tuple[int, int]:
    """The size (h, w) of an image file as `decode` gives it; raises FileError.

    A PNG file is decoded, because its orientation may follow its pixels.
    """
    with decoding(path), Image.open(path, formats=FORMATS) as image:
        if image.format == "TIFF" and _exif_orientation(image) > 1:
            image.load()  # Pillow then rotates it, and reports it as upright
        width, height = image.size
        return (width, height) if _exif_orientation(image) > 4 else (height, width)


TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation


def decode(path: Path, longest: int | None = None) -> DecodedFile:
    """Decode an image file of any bit depth and rotate it upright.

    With `longest`, a JPEG image that is much larger is decoded at a half, a quarter or an eighth of its size,
    which is faster. Its longest side is then at most `longest` and at least `MIN_DRAFT` of it. The caller
    shrinks all other images.

    Raises FileError if it is not an image of `FORMATS`, cannot be fully decoded, or has several frames.
    """
    with decoding(path), path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
        n_frames = getattr(image, "n_frames", 1)
        if n_frames > 1 and image.format in ("PNG", "WEBP", "TIFF"):
            raise FileError(
                f"{path}: holds {n_frames} images (frames or pages), and it is not clear which one is meant; "
                "expected one image per file"
            )
        # In a BMP file, 16 are the bits of a pixel.
        has_16_bits = ";16" in repr(image.tile) and image.format != "BMP"
        is_16_bit_color = has_16_bits and image.mode.startswith(("RGB", "LA"))
        orientation = _exif_orientation(image)
        stored_size = image.size
        shrunk = _load_jpeg_shrunk(image, longest) if longest else None
        image.load()
        # Pillow itself rotates TIFF files, and then reports them as upright.
        to_turn = _exif_orientation(image)
        pixels = shrunk or image
        upright = pixels.transpose(TRANSPOSES[to_turn]) if to_turn > 1 else pixels.copy()
        width, height = stored_size if shrunk else pixels.size
        size = (width, height) if to_turn > 4 else (height, width)
        return DecodedFile(path, upright, size, orientation, _is_lossy(image, file), is_16_bit_color)


def _load_jpeg_shrunk(image: Image.Image, longest: int) -> Image.Image | None:
    """Decode an opened JPEG file at a reduced scale, as `decode` says; None if it is no such file."""
    width, height = image.size
    enough = fit_size((height, width), MIN_DRAFT * longest)
    draft = image.draft(None, enough[::-1])
    if draft is None or image.size == (width, height):
        return None
    _, box = draft  # the part that shows the image: its sides may not be multiples of the scale
    new_height, new_width = fit_size((height, width), min(longest, max(box)))
    if box[2:] == (new_width, new_height):
        return image
    return image.resize((new_width, new_height), Image.Resampling.BILINEAR, box)


def _exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. A damaged EXIF block counts as none: other programs skip it as well."""
    try:
        orientation = image.getexif().get(0x0112)
    except (OSError, SyntaxError, ValueError, TypeError, RuntimeError, LookupError, struct.error):
        return 1
    return orientation if orientation in TRANSPOSES else 1


def _is_lossy(image: Image.Image, file: BinaryIO) -> bool:
    if image.format == "WEBP":  # the pixels are in a chunk "VP8L" if they are lossless
        file.seek(0)
        return b"VP8L" not in file.read(4096)
    return image.format in ("JPEG", "MPO") or image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turn whatever Pillow raises for a file into a FileError that names it, except MemoryError."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait forever
            raise OSError("not a file")
        yield
    except (UserError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        expected = f"expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise FileError(f"{path}: cannot be decoded: {_describe_content(path)}; {expected}") from error
    except Exception as error:  # decoders also raise TypeError, RuntimeError and others for damaged files
        raise FileError(f"{path}: cannot be decoded ({error or type(error).__name__})") from error


def _describe_content(path: Path) -> str:
    """Say what a file holds that is not an image of `FORMATS`."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start.strip(b"\0"):
        return "its content is zeros" if start else "it is empty"
    if start.startswith(KNOWN_STARTS):
        return "its content is damaged"
    for signature, kind in OTHER_CONTENT.items():
        if start.startswith(signature) or start[4:].startswith(signature):
            return f"its content is {kind}"
    return "its content is no known image"
