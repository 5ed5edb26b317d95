"""Pairs of image and mask files: matching them by name, and reading them."""

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from imaging.files import NO_IMAGE_FILE, DecodedFile, FileError, decode, image_files, to_rgb, unread_files
from imaging.masks import MaskReading, MaskValues, interpret

# What programs append to the name of an image: "x_mask.png" or "x.jpg.png" for "x.jpg".
MASK_SUFFIX = re.compile(
    r"(\.(png|jpe?g|webp|tiff?|bmp))?([ _.-]*(masks?|labels?|seg|segmentation|gt))?$", re.IGNORECASE
)


@dataclass(frozen=True)
class Pair:
    """An image file and its mask file.

    mask_values: see `imaging.masks.read_mask`.
    """

    image_path: Path
    mask_path: Path
    mask_values: MaskValues = None


# --- Matching ----------------------------------------------------------------------------------


def normalized(stem: str) -> str:
    """A stem with composed Unicode characters: macOS writes "é" as two characters."""
    return unicodedata.normalize("NFC", stem)


def match_by_stem(
    image_paths: Iterable[Path], mask_paths: Iterable[Path]
) -> tuple[list[tuple[Path, Path]], list[Path], list[Path]]:
    """Match images with masks by their stems, which are unique among the images and among the masks.

    A mask without an image of the same stem belongs to the image "x" if its stem is "x_mask", "x-label",
    "x.jpg" or the like, and if this holds for no other mask.

    Returns:
        The pairs (image, mask), sorted by the stem of the image; the other images; the other masks.
    """
    images = {normalized(path.stem): path for path in image_paths}
    masks = {normalized(path.stem): path for path in mask_paths}
    matched = {stem: stem for stem in images.keys() & masks.keys()}  # image stem -> mask stem
    shortened = {stem: MASK_SUFFIX.sub("", stem, count=1) for stem in masks.keys() - matched.keys()}
    n_claims = Counter(shortened.values())
    for mask_stem, stem in shortened.items():
        if stem in images and stem not in matched and n_claims[stem] == 1:
            matched[stem] = mask_stem
    used = set(matched.values())
    return (
        [(images[stem], masks[matched[stem]]) for stem in sorted(matched)],
        [images[stem] for stem in sorted(images.keys() - matched.keys())],
        [masks[stem] for stem in sorted(masks.keys() - used)],
    )


def find_pairs(data_dir: Path, mask_values: MaskValues = None) -> tuple[list[Pair], list[str]]:
    """Match the images in `data_dir/imgs` with the masks in `data_dir/masks` by their stems.

    Returns:
        The pairs, sorted by stem, and one message for each fault: a missing or empty folder, a second
        file with the same stem, an image without a mask, a mask without an image.
    """
    faults: list[str] = []
    found: list[list[Path]] = []
    for folder in (data_dir / "imgs", data_dir / "masks"):
        if not folder.is_dir():
            return [], [*faults, f"{folder}: no such folder (expected imgs/ and masks/ in {data_dir})"]
        by_stem: dict[str, Path] = {}
        for path in image_files(folder):
            stem = normalized(path.stem)
            if stem in by_stem:
                faults.append(f"{path}: has the same stem as {by_stem[stem].name}")
            by_stem[stem] = path
        if not by_stem:
            return [], [*faults, f"{folder}: {NO_IMAGE_FILE}"]
        found.append(list(by_stem.values()))
    matched, images, masks = match_by_stem(*found)
    unread = {
        (folder, normalized(path.stem)): path.name
        for folder in ("imgs", "masks")
        for path in unread_files(data_dir / folder)
        if path.is_file()
    }

    def hint(path: Path, folder: str, others: list[Path]) -> str:
        """What may be the partner of a file in the other folder."""
        name = unread.get((folder, normalized(path.stem)))
        return f" ({name} there has a suffix that is not read)" if name else _closest(path, others)

    no_mask = [f"{path}: has no mask in masks/{hint(path, 'masks', masks)}" for path in images]
    no_image = [f"{path}: has no image in imgs/{hint(path, 'imgs', images)}" for path in masks]
    # A message shows the first faults of a list: both sides take turns.
    turns = chain.from_iterable(zip_longest(no_mask, no_image))
    faults += [fault for fault in turns if fault is not None]
    return [Pair(*paths, mask_values) for paths in matched], faults


def _closest(path: Path, others: list[Path]) -> str:
    """Name the file of the other folder without a partner whose name is the most similar."""
    names = [other.name for other in others[:1000]]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0) if names else []
    return f" (without a partner there: {close[0]})" if close else ""


# --- Reading -----------------------------------------------------------------------------------


def read_pair(pair: Pair, longest: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read an image, RGB uint8 (H, W, 3), and its mask, bool (H, W); raises FileError.

    They have the same size, unless `longest` shrinks a JPEG image; see `imaging.files.decode`.
    """
    image, reading = interpret_pair(pair, longest)
    return image, reading.mask


def interpret_pair(pair: Pair, longest: int | None = None) -> tuple[np.ndarray, MaskReading]:
    """Like `read_pair`, with what the mask file tells besides the mask."""
    image_file = decode(pair.image_path, longest)
    return to_rgb(image_file), interpret_mask(image_file, pair.mask_path, pair.mask_values)


def interpret_mask(image_file: DecodedFile, path: Path, mask_values: MaskValues = None) -> MaskReading:
    """Interpret the mask file of a decoded image.

    Raises FileError if it cannot be read, if the sizes differ, or if it is unclear whether the mask was drawn
    before or after the image was rotated by its EXIF orientation.
    """
    mask_file = decode(path)
    height, width = image_file.size
    mask_width, mask_height = mask_file.image.size
    turns = image_file.orientation, mask_file.orientation
    if (height, width) != (mask_height, mask_width):
        note = ""
        if turns[0] != turns[1]:
            note = f" (the EXIF orientation is {turns[0]} in the image and {turns[1]} in the mask)"
        raise FileError(
            f"{image_file.path}: is {height} x {width} (h x w) but its mask is "
            f"{mask_height} x {mask_width}{note}"
        )
    # If one of the two is turned by 90 degrees and the sizes are equal, both are upright.
    turned_by_size = height != width and max(turns) > 4 and min(turns) == 1
    if turns[0] != turns[1] and not turned_by_size:
        raise FileError(
            f"{image_file.path}: its EXIF orientation is {turns[0]}, that of its mask {path.name} is "
            f"{turns[1]}, and the sizes do not tell whether the mask fits the image as it is turned by "
            "this tag. If it does, save the image turned and without the tag; if not, remove the tag"
        )
    return interpret(mask_file, mask_values)
