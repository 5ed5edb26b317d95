"""Images and videos in and out of prediction."""

import io
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from base import atomic
from base.errors import UserError
from imaging.coco import read_prompts
from imaging.files import (
    NO_IMAGE_FILE,
    FileError,
    check_size,
    decode,
    format_list,
    image_files,
    to_rgb,
)
from imaging.pairing import interpret_mask, match_by_stem, normalized
from imaging.prompts import Prompt

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm"}
DEFAULT_FRAME_RATE = 25.0
MAX_RATE_TICKS = 65535  # MPEG-4 stores a rate as a fraction of 16-bit numbers


@dataclass(frozen=True)
class InputImage:
    """An image to predict.

    name: the name of its file; a frame of a video has an invented one.
    stem: the name, without suffix, of the files that are written for it.
    image: RGB uint8 (H, W, 3).
    mask: the true mask, bool (H, W), or None if it is not known.
    """

    name: str
    stem: str
    image: np.ndarray
    mask: np.ndarray | None = None


# --- Images ------------------------------------------------------------------------------------


def find_images(path: Path) -> list[Path]:
    """Find the files to predict: `path` itself, or the image files in this folder.

    Raises UserError if there are none, or if two of them have the same stem.
    """
    if os.path.isfile(path):  # unlike Path.is_file(), False for a path without permission
        return [path]
    if not os.path.isdir(path):
        raise UserError(f"--input {path}: no such file or folder, or no permission to read it")
    paths = image_files(path)
    if not paths:
        raise UserError(f"--input {path}: {NO_IMAGE_FILE}")
    n_files = Counter(image_path.stem for image_path in paths)
    doubles = [image_path.name for image_path in paths if n_files[image_path.stem] > 1]
    if doubles:
        raise UserError(
            f"--input {path}: {doubles[0]} and {doubles[1]} would give one mask; rename one of them"
        )
    return paths


def find_masks(folder: Path, image_paths: Iterable[Path]) -> dict[str, Path]:
    """Find the true mask of each image in a folder, by the stem of the image.

    Raises UserError if the folder is missing, or listing the images without a mask or with two.
    """
    if not os.path.isdir(folder):
        raise UserError(f"--masks {folder}: no such folder, or no permission to read it")
    mask_files = image_files(folder)
    images = list(image_paths)
    pairs, unmatched, _ = match_by_stem(images, mask_files)
    missing = [image_path for image_path in images if image_path in unmatched]
    n_files = Counter(normalized(path.stem) for path in mask_files)
    doubled = [image_path for image_path, mask_path in pairs if n_files[normalized(mask_path.stem)] > 1]
    for fault, paths in (("no mask", missing), ("two masks", doubled)):
        if paths:
            raise UserError(
                f"--masks {folder}: {fault} for {len(paths)} of {len(images)} images; expected one file with "
                f"the name of the image and .png, .jpg or the like:\n  {format_list([p.name for p in paths])}"
            )
    return {image_path.stem: mask_path for image_path, mask_path in pairs}


def find_prompts(path: Path, image_paths: Iterable[Path]) -> dict[str, list[Prompt]]:
    """Read the prompts of each image, by its stem, from a CSV or COCO file.

    Raises UserError if the file cannot be read, or listing the images without a prompt.
    """
    prompts = {normalized(stem): several for stem, several in read_prompts(path).items()}
    stems = {image_path: normalized(image_path.stem) for image_path in image_paths}
    missing = [image_path.name for image_path, stem in stems.items() if stem not in prompts]
    if missing:
        raise UserError(
            f"--prompt {path}: no prompt for {len(missing)} of {len(stems)} images; "
            f"every image needs one:\n  {format_list(missing)}"
        )
    return {image_path.stem: prompts[stem] for image_path, stem in stems.items()}


def read_images(
    paths: Iterable[Path], mask_paths: Mapping[str, Path], max_pixels: int, faults: list[str]
) -> Iterator[InputImage]:
    """Read images one by one, with their true masks if `mask_paths` has them by stem.

    An image that cannot be read is left out. An image whose mask cannot be read, or has another size, comes
    without its mask. A message about each is appended to `faults`.
    """
    for path in paths:
        try:
            check_size(path, max_pixels)
            image_file = decode(path)
            image = to_rgb(image_file)
        except FileError as error:
            faults.append(f"not predicted: {error}")
            continue
        mask = None
        if path.stem in mask_paths:
            try:
                check_size(mask_paths[path.stem], max_pixels)
                mask = interpret_mask(image_file, mask_paths[path.stem]).mask
            except FileError as error:
                faults.append(f"predicted, but not compared: {error}")
        yield InputImage(path.name, path.stem, image, mask)


def encode_image(image: np.ndarray, suffix: str) -> bytes:
    """The content of a PNG file, or of a JPEG file for any suffix but .png.

    `image` is uint8 (H, W, 3), uint8 (H, W), or for PNG uint16 (H, W).
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG" if suffix == ".png" else "JPEG")
    return buffer.getvalue()


def write_image(path: Path, image: np.ndarray) -> None:
    """Write the file of `encode_image` whole or not at all; raises UserError."""
    content = encode_image(image, path.suffix)
    atomic.write_atomically(path, lambda file: file.write(content))


# --- Videos ------------------------------------------------------------------------------------


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def frame_count(path: Path) -> int:
    """The number of frames that the header of a video states; 0 if it states none."""
    return max(0, int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)))


def frame_rate(path: Path) -> float:
    """The frames per second that the header of a video states, or 25 if it states none that is possible."""
    rate = cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS)
    return rate if 0 < rate <= MAX_RATE_TICKS else DEFAULT_FRAME_RATE


def frame_stem(path: Path, number: int) -> str:
    """The stem of the files of a frame, numbered from 0."""
    return f"{path.stem}_{number:06d}"


def require_video(path: Path) -> None:
    """Raise UserError unless the first frame of a video can be decoded."""
    if not cv2.VideoCapture(str(path)).read()[0]:
        raise UserError(f"--input {path}: no frame of this video can be decoded; expected a video file")


def read_frames(path: Path) -> Iterator[InputImage]:
    """Read the frames of a video one by one, until none is left or one cannot be decoded."""
    video = cv2.VideoCapture(str(path))
    for number in count():
        is_read, frame = video.read()
        if not is_read:
            return
        stem = frame_stem(path, number)
        yield InputImage(f"{stem}.png", stem, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))


class VideoWriter:
    """A context that writes frames to an MP4 video, which appears whole or not at all.

    The frames have the size of the first one, padded to even numbers: the codec takes no others.
    """

    def __init__(self, path: Path, rate: float) -> None:
        """`rate` is in frames per second."""
        self.path, self.rate, self.n_frames = path, _codec_rate(rate), 0
        self._video: cv2.VideoWriter | None = None

    def __enter__(self) -> "VideoWriter":
        self._folder = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self._folder.mkdir()  # OpenCV writes to a path only, whose suffix says the format
        except OSError as error:
            raise UserError(f"{self.path} could not be written: {error.strerror}") from error
        self._temporary = self._folder / self.path.name
        return self

    def __exit__(self, *error: object) -> None:
        if self._video is not None:
            self._video.release()
        shutil.rmtree(self._folder, ignore_errors=True)

    def write(self, frame: np.ndarray) -> None:
        """Append a frame, RGB uint8 (H, W, 3). Raises UserError if the video cannot be opened."""
        if self._video is None:
            self._size = frame.shape[1], frame.shape[0]
            even = (self._size[0] + self._size[0] % 2, self._size[1] + self._size[1] % 2)
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._video = cv2.VideoWriter(str(self._temporary), codec, self.rate, even)
            if not self._video.isOpened():
                raise UserError(
                    f"{self.path}: OpenCV cannot write a video of {even[0]} x {even[1]} pixels and "
                    f"{self.rate:g} frames per second; predict a folder of the frames instead"
                )
        if frame.shape[1::-1] != self._size:  # a few videos change their size
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
        bottom, right = frame.shape[0] % 2, frame.shape[1] % 2
        padded = cv2.copyMakeBorder(frame, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
        self._video.write(cv2.cvtColor(padded, cv2.COLOR_RGB2BGR))
        self.n_frames += 1

    def finish(self) -> None:
        """Give the video its name, once it opens again with all frames; raises UserError."""
        if self._video is None:
            return
        self._video.release()
        found = frame_count(self._temporary)
        if found != self.n_frames:
            raise UserError(
                f"{self.path} could not be written: of {self.n_frames} frames it holds {found}; "
                "possibly the disk is full"
            )
        try:
            self._temporary.replace(self.path)
        except OSError as error:
            raise UserError(f"{self.path} could not be written: {error.strerror}") from error


def _codec_rate(rate: float) -> float:
    """`rate` with as many of 3 decimals as the codec takes: a fraction of numbers up to 65535."""
    decimals = next((n for n in (3, 2, 1) if rate * 10**n <= MAX_RATE_TICKS), 0)
    return round(rate, decimals) or rate
