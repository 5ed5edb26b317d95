"""Pictures and videos to predict, in and out."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from base import atomic
from base.errors import UserError
from imaging.files import IMAGE_SUFFIXES, check_size, read_image, read_mask

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm"}


@dataclass(frozen=True)
class Picture:
    """One to predict: `image` RGB uint8 (H, W, 3), and `truth` bool (H, W) or None.

    `name` is that of its file; what is written of it has the name `stem`.
    """

    name: str
    stem: str
    image: np.ndarray
    truth: np.ndarray | None = None


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def frame_count(path: Path) -> int:
    """How many frames a video says that it has; 0 if it is none."""
    return max(0, int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)))


def find_pictures(path: Path) -> list[Path]:
    """The files to predict; raises UserError if there are none, or two of a stem."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--input {path}: no such file or folder")
    pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not pictures:
        raise UserError(f"--input {path}: no .png, .jpg or .jpeg file in it")
    stems = Counter(picture.stem for picture in pictures)
    doubles = [picture.name for picture in pictures if stems[picture.stem] > 1]
    if doubles:
        raise UserError(f"--input {path}: {doubles[0]} and {doubles[1]} would give one mask")
    return pictures


def find_truths(folder: Path, pictures: list[Path]) -> dict[str, Path]:
    """The true masks by stem; raises UserError naming the first picture without one."""
    if not folder.is_dir():
        raise UserError(f"--masks {folder}: no such folder")
    stems = {file.stem: file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES}
    for picture in pictures:
        if picture.stem not in stems:
            raise UserError(f"--masks {folder}: no mask for {picture.name}")
    return {picture.stem: stems[picture.stem] for picture in pictures}


def read_pictures(paths: list[Path], truths: dict[str, Path], unreadable: list[str]) -> Iterator[Picture]:
    """Those that can be read; messages of the rest go to `unreadable`."""
    for path in paths:
        try:
            check_size(path)
            image = read_image(path)
            truth = read_mask(truths[path.stem]) if path.stem in truths else None
            if truth is not None and truth.shape != image.shape[:2]:
                raise UserError(f"{path}: is {image.shape[:2]} (h, w), but its mask is {truth.shape}")
        except UserError as error:
            unreadable.append(str(error))
            continue
        yield Picture(path.name, path.stem, image, truth)


def read_frames(path: Path, unreadable: list[str]) -> Iterator[Picture]:
    """The frames of a video, numbered from 0; a message to `unreadable` if it ends early."""
    video = cv2.VideoCapture(str(path))
    expected, number = frame_count(path), 0
    while True:
        there, frame = video.read()
        if not there:
            break
        stem = f"{path.stem}_{number:06d}"
        yield Picture(f"{stem}.png", stem, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        number += 1
    if number < max(expected, 1):
        unreadable.append(f"{path}: of {expected} frames only {number} can be decoded")


def write_picture(path: Path, array: np.ndarray) -> None:
    kind = "PNG" if path.suffix == ".png" else "JPEG"
    atomic.write_atomically(path, partial(Image.fromarray(array).save, format=kind))


def write_video(output: Path, source: Path, stems: Iterable[str]) -> None:
    """Join the overlays of a video's frames to one, `overlays/NAME.mp4`; raises UserError if it cannot."""
    target = output / "overlays" / f"{source.stem}.mp4"
    rate = cv2.VideoCapture(str(source)).get(cv2.CAP_PROP_FPS) or 25
    frames = (read_image(output / "overlays" / f"{stem}.jpg") for stem in stems)
    first = next(frames)
    with tempfile.TemporaryDirectory(dir=output) as folder:  # cv2 takes a name, not a file
        whole = Path(folder) / target.name
        video = cv2.VideoWriter(str(whole), cv2.VideoWriter.fourcc(*"mp4v"), rate, first.shape[1::-1])
        if not video.isOpened():
            raise UserError(f"{target}: OpenCV cannot write it")
        for frame in chain([first], frames):
            video.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        video.release()
        whole.replace(target)
