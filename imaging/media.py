"""Images and videos in and out of prediction."""

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from base import atomic
from base.errors import UserError
from imaging.coco import read_prompts
from imaging.files import NO_IMAGE_FILE, FileError, check_size, image_files, read_image
from imaging.pairing import Pair, match_by_stem, read_pair
from imaging.prompts import Prompt

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm"}
DEFAULT_FRAME_RATE = 25.0


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
    """Find the true mask of each image in a folder, by stem.

    Raises UserError if the folder is missing, or naming the first image without a mask.
    """
    if not os.path.isdir(folder):
        raise UserError(f"--masks {folder}: no such folder, or no permission to read it")
    pairs, without_mask, _ = match_by_stem(image_paths, image_files(folder))
    if without_mask:
        raise UserError(f"--masks {folder}: no mask for {without_mask[0].name}")
    return {image_path.stem: mask_path for image_path, mask_path in pairs}


def find_prompts(path: Path, image_paths: Iterable[Path]) -> dict[str, list[Prompt]]:
    """Read the prompts of each image by its stem from a CSV or COCO file.

    Raises UserError if the file cannot be read, or naming the first image without a prompt.
    """
    prompts = read_prompts(path)
    for image_path in image_paths:
        if image_path.stem not in prompts:
            raise UserError(f"--prompt {path}: no prompt for {image_path.name}")
    return prompts


def read_images(
    paths: Iterable[Path], mask_paths: Mapping[str, Path], faults: list[str]
) -> Iterator[InputImage]:
    """Read images one by one, with their true masks if `mask_paths` has them by stem.

    An image that cannot be read is left out, and a message about it is appended to `faults`.
    """
    for path in paths:
        try:
            check_size(path)
            image: np.ndarray
            mask: np.ndarray | None
            if path.stem in mask_paths:
                check_size(mask_paths[path.stem])
                image, mask = read_pair(Pair(path, mask_paths[path.stem]))
            else:
                image, mask = read_image(path), None
        except FileError as error:
            faults.append(str(error))
            continue
        yield InputImage(path.name, path.stem, image, mask)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image or a mask atomically, as PNG or else as JPEG by its suffix; raises UserError.

    `image` is uint8 (H, W, 3), uint8 (H, W), or for PNG uint16 (H, W).
    """
    kind = "PNG" if path.suffix == ".png" else "JPEG"
    atomic.write_atomically(path, partial(Image.fromarray(image).save, format=kind))


# --- Videos ------------------------------------------------------------------------------------


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def frame_count(path: Path) -> int:
    """The number of frames that the header of a video states; 0 if the file is not a video."""
    return max(0, int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)))


def frame_rate(path: Path) -> float:
    """The frames per second that the header of a video states, or 25 if it states none."""
    rate = cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS)
    return rate if rate > 0 else DEFAULT_FRAME_RATE


def read_frames(path: Path, faults: list[str]) -> Iterator[InputImage]:
    """Read the frames of a video one by one, numbered from 0.

    If the video ends early, a message about it is appended to `faults`.
    """
    video = cv2.VideoCapture(str(path))
    expected, number = frame_count(path), 0
    while True:
        is_read, frame = video.read()
        if not is_read:
            break
        stem = f"{path.stem}_{number:06d}"
        yield InputImage(f"{stem}.png", stem, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        number += 1
    if number < max(expected, 1):
        faults.append(f"{path}: of {expected} frames only {number} can be decoded")


def write_video(path: Path, frame_paths: Sequence[Path], rate: float) -> None:
    """Join image files of one size to a video of `rate` frames per second, written whole or not at all.

    Raises UserError if a frame cannot be read or the video cannot be written.
    """
    frames = (read_image(frame_path) for frame_path in frame_paths)
    first = next(frames)
    size = (first.shape[1], first.shape[0])
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # OpenCV writes to a path only
            temporary = Path(folder) / path.name
            video = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
            if not video.isOpened():
                raise UserError(f"{path}: OpenCV cannot write this video")
            for frame in chain([first], frames):
                video.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            video.release()
            temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error}") from error
