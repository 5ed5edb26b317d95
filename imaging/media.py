"""Images, videos and cameras in and out of prediction."""

import io
import math
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import count
from pathlib import Path, PurePosixPath
from queue import Empty, Queue
from urllib.parse import urlsplit

import av
import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from base import atomic
from base.errors import UserError
from imaging.coco import read_prompts
from imaging.files import (
    FORMATS,
    IMAGE_SUFFIXES,
    NO_IMAGE_FILE,
    FileError,
    check_size,
    decode,
    format_list,
    image_files,
    read_size,
    to_rgb,
    unread_files,
)
from imaging.output_folder import LIST_NAME
from imaging.pairing import interpret_mask, match_by_stem, normalized
from imaging.prompts import Prompt

# Files of a folder that are videos. A single file of another suffix is tried.
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".avi", ".divx", ".mkv", ".webm", ".ogv", ".wmv", ".asf",
    ".flv", ".f4v", ".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".mxf", ".dv", ".mjpg", ".mjpeg",
    ".h264", ".264", ".h265", ".265", ".hevc", ".y4m", ".gif",
)  # fmt: skip
# Photos in formats that are not read. Formats that often hold other data, such as .pgm or .psd, are left out.
UNREAD_PHOTO_SUFFIXES = (
    ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".jpe", ".jfif", ".ppm",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
)  # fmt: skip
DEFAULT_FRAME_RATE = 25.0
MAX_FRAME_RATE = 1000.0  # headers without a frame rate state the clock of their format instead, such as 90000
MAX_RATE_DENOMINATOR = 65535  # rates are fractions; 30000/1001 is the most usual one that is no whole number
STALL = 20.0  # seconds without a frame after which a camera or a stream counts as ended


@dataclass(frozen=True)
class InputFile:
    """An image file to predict.

    name: relative to the folder that is predicted, with "/" and without `imgs/`.
    stem: the name, without suffix, of the files that are written for it: "a_0" for "a/0.png".
    """

    path: Path
    name: str
    stem: str


@dataclass(frozen=True)
class Video:
    """A video file, a stream or a camera to predict.

    source: what OpenCV opens: a path, a URL, or the number of a camera.
    name: for messages. It contains no password.
    stem: how the names of the files that are written for it begin.
    """

    source: Path | str | int
    name: str
    stem: str


@dataclass(frozen=True)
class InputImage:
    """An image to predict.

    name: as in `InputFile`; a frame of a video gets one of the same form.
    stem: the name, without suffix, of the files that are written for it.
    image: RGB uint8 (H, W, 3).
    mask: the true mask, bool (H, W), or None if it is not known.
    """

    name: str
    stem: str
    image: np.ndarray
    mask: np.ndarray | None = None


# --- Finding -----------------------------------------------------------------------------------


def find_inputs(source: Path | str | int) -> tuple[list[InputFile], list[Video]]:
    """Find the images and the videos to predict: a file, those of a folder, a URL, or a camera.

    A folder without images and videos of its own is read as its `imgs/`, if it has one, or else as all its
    subfolders. Raises UserError if there is nothing to predict, or if two files would give the same results.
    """
    if isinstance(source, int):
        return [], [Video(source, f"camera {source}", f"camera_{source}")]
    if isinstance(source, str):
        stem = PurePosixPath(urlsplit(source).path).stem
        return [], [Video(source, without_password(source), re.sub(r"[^\w.-]", "_", stem) or "stream")]
    if device := re.fullmatch(r"/dev/video(\d+)", os.path.realpath(source)):  # a camera on Linux
        return find_inputs(int(device[1]))
    if os.path.isfile(source):  # unlike Path.is_file(), False for a path without permission
        file = InputFile(source, source.name, source.stem)
        return ([], [Video(source, str(source), source.stem)]) if is_video(source) else ([file], [])
    if not os.path.isdir(source):
        raise UserError(f"--input {source}: no such file or folder, or no permission to read it")
    files = [_input_file(path, source) for path in _files_in(source, set())]
    if not files:
        unread = [f"; {path.name} has a format that is not read" for path in find_unread(source)[:1]]
        raise UserError(
            f"--input {source}: {NO_IMAGE_FILE}, no video, and none in its folders{''.join(unread)}"
        )
    images = [file for file in files if file.path.suffix.lower() in IMAGE_SUFFIXES]
    videos = [file for file in files if file not in images]
    _require_distinct(source, images, videos)
    return images, [Video(file.path, str(file.path), file.stem) for file in videos]


def find_unread(source: Path | str | int) -> list[Path]:
    """The photos in the folders that `find_inputs` reads whose format is not read; [] for any other source.

    A photo beside an image of the same stem is left out: cameras write a JPEG file beside a raw one.
    """
    if not isinstance(source, Path) or not os.path.isdir(source):
        return []
    folders: set[Path] = set()
    _files_in(source, folders)
    found = []
    for folder in sorted(folders):
        stems = {path.stem for path in image_files(folder)}
        photos = [path for path in unread_files(folder) if path.suffix.lower() in UNREAD_PHOTO_SUFFIXES]
        found += [path for path in photos if path.stem not in stems]
    return found


def without_password(source: Path | str | int) -> str:
    """The text of `--input`, without the user and the password that a URL may contain."""
    return re.sub(r"://[^/]*@", "://", source) if isinstance(source, str) else str(source)


def _files_in(folder: Path, seen: set[Path]) -> list[Path]:
    """The images and videos that `find_inputs` says, but not those of earlier predictions."""
    seen.add(folder.resolve())
    others = unread_files(folder)
    files = image_files(folder) + [path for path in others if path.suffix.lower() in VIDEO_SUFFIXES]
    if files:
        return files
    folders = [path for path in others if path.is_dir() and not (path / LIST_NAME).exists()]
    if folder / "imgs" in folders:
        folders = [folder / "imgs"]
    return [file for sub in folders if sub.resolve() not in seen for file in _files_in(sub, seen)]


def _input_file(path: Path, folder: Path) -> InputFile:
    *parents, name = path.relative_to(folder).parts
    parents = [part for part in parents if part != "imgs"]
    return InputFile(path, "/".join([*parents, name]), "_".join([*parents, path.stem]))


def _require_distinct(folder: Path, images: list[InputFile], videos: list[InputFile]) -> None:
    """Raise UserError if two files would give results of the same name."""
    first: dict[str, InputFile] = {}
    claims = [(video, f"{video.stem}_*") for video in videos] + [(image, image.stem) for image in images]
    for file, claim in claims:
        as_frame = re.sub(r"_\d{6}$", "_*", claim)  # see `frame_stem`
        other = first.get(claim) or first.get(as_frame)
        if other:
            raise UserError(
                f"--input {folder}: {other.name} and {file.name} would give one mask; rename one of them"
            )
        first[claim] = file


def find_masks(folder: Path, images: Iterable[InputFile]) -> dict[str, Path]:
    """Find the true mask of each image in a folder, by the stem of the image.

    The masks of images in subfolders are in the same subfolders. A folder without images of its own is read
    as its `masks/`. Raises UserError if the folder is missing, or listing the images without a mask or with
    two.
    """
    if not os.path.isdir(folder):
        raise UserError(f"--masks {folder}: no such folder, or no permission to read it")
    groups: dict[PurePosixPath, dict[Path, InputFile]] = {}
    for image in images:
        groups.setdefault(PurePosixPath(image.name).parent, {})[image.path] = image
    found: dict[str, Path] = {}
    faults: dict[str, list[str]] = {"no mask": [], "two masks": []}
    for parent, group in groups.items():
        mask_files = _mask_files(folder / parent)
        pairs, unmatched, _ = match_by_stem(list(group), mask_files)
        n_files = Counter(normalized(path.stem) for path in mask_files)
        doubled = {path for path, mask_path in pairs if n_files[normalized(mask_path.stem)] > 1}
        faults["no mask"] += [image.name for path, image in group.items() if path in unmatched]
        faults["two masks"] += [image.name for path, image in group.items() if path in doubled]
        found |= {group[path].stem: mask_path for path, mask_path in pairs}
    n_images = sum(map(len, groups.values()))
    for fault, names in faults.items():
        if names:
            raise UserError(
                f"--masks {folder}: {fault} for {len(names)} of {n_images} images; expected one file with "
                f"the name of the image and .png, .jpg or the like:\n  {format_list(names)}"
            )
    return found


def _mask_files(folder: Path) -> list[Path]:
    if not os.path.isdir(folder):
        return []
    return image_files(folder) or (image_files(folder / "masks") if (folder / "masks").is_dir() else [])


def find_prompts(path: Path, images: Iterable[InputFile], max_pixels: int) -> dict[str, list[Prompt]]:
    """Read the prompts of each image, by its stem, from a CSV or COCO file, which has the names of files.

    Raises UserError if the file cannot be read, if images of two subfolders have the same name, or listing
    the prompts outside of their image, or the images without a prompt.
    """
    names: dict[str, InputFile] = {}
    for image in images:
        other = names.setdefault(normalized(image.path.stem), image)
        if other is not image:
            raise UserError(
                f"--prompt {path}: {other.name} and {image.name} have the same file name, which does not say "
                "whose prompt it is; predict one subfolder at a time"
            )

    @cache
    def size_of(stem: str) -> tuple[int, int] | None:
        with suppress(FileError):  # `read_images` leaves the image out
            if stem in names and check_size(names[stem].path, max_pixels):
                return read_size(names[stem].path)
        return None

    prompts = read_prompts(path, size_of)
    missing = [image.path.name for stem, image in names.items() if stem not in prompts]
    if missing:
        raise UserError(
            f"--prompt {path}: no prompt for {len(missing)} of {len(names)} images; "
            f"every image needs one:\n  {format_list(missing)}"
        )
    return {image.stem: prompts[stem] for stem, image in names.items()}


def read_images(
    files: Iterable[InputFile], mask_paths: Mapping[str, Path], max_pixels: int, faults: list[str]
) -> Iterator[InputImage]:
    """Read images one by one, with their true masks if `mask_paths` has them by stem.

    An image that cannot be read is left out. An image whose mask cannot be read, or has another size, comes
    without its mask. A message about each is appended to `faults`.
    """
    for file in files:
        try:
            check_size(file.path, max_pixels)
            image_file = decode(file.path)
            image = to_rgb(image_file)
        except FileError as error:
            faults.append(f"not predicted: {error}")
            continue
        mask = None
        if file.stem in mask_paths:
            try:
                check_size(mask_paths[file.stem], max_pixels)
                mask = interpret_mask(image_file, mask_paths[file.stem]).mask
            except FileError as error:
                faults.append(f"predicted, but not compared: {error}")
        yield InputImage(file.name, file.stem, image, mask)


MAX_JPEG_SIDE = 65500  # pixels; the format has no larger images


def encode_image(image: np.ndarray, suffix: str) -> bytes:
    """The content of a PNG file, or of a JPEG file for any suffix but .png.

    `image` is uint8 (H, W, 3), uint8 (H, W), or for PNG uint16 (H, W). JPEG shrinks it to MAX_JPEG_SIDE.
    """
    buffer, pil_image = io.BytesIO(), Image.fromarray(image)
    if suffix != ".png":
        pil_image.thumbnail((MAX_JPEG_SIDE, MAX_JPEG_SIDE))
    pil_image.save(buffer, format="PNG" if suffix == ".png" else "JPEG")
    return buffer.getvalue()


def write_image(path: Path, image: np.ndarray) -> None:
    """Write the file of `encode_image` whole or not at all; raises UserError."""
    content = encode_image(image, path.suffix)
    atomic.write_atomically(path, lambda file: file.write(content))


# --- Videos ------------------------------------------------------------------------------------


def is_video(path: Path) -> bool:
    """Whether a file is a video: by its suffix, or by its content if the suffix says nothing."""
    suffix = path.suffix.lower()
    return suffix in VIDEO_SUFFIXES or (
        suffix not in IMAGE_SUFFIXES and not _is_image(path) and has_frames(path)
    )


def _is_image(path: Path) -> bool:
    try:
        Image.open(path, formats=FORMATS).close()
    except (OSError, UnidentifiedImageError):
        return False
    return True


def open_video(source: Path | str | int) -> cv2.VideoCapture:
    """Open a video file, a URL or a camera; what cannot be opened has no frames."""
    return cv2.VideoCapture(source if isinstance(source, int) else str(source))


def has_frames(source: Path | str | int) -> bool:
    """Whether the first frame can be decoded."""
    return bool(open_video(source).read()[0])


def require_video(video: Video) -> None:
    """Raise UserError unless the first frame can be decoded."""
    if not has_frames(video.source):
        what = {int: "camera", str: "stream"}.get(type(video.source), "video")
        raise UserError(
            f"--input {video.name}: no frame of this {what} can be decoded; expected a video file, the URL "
            "of a stream, or the number of a camera, such as 0"
        )


def frame_count(source: Path | str | int) -> int:
    """The number of frames that a video should have by its header; 0 if it states none, as that of a camera.

    The header of a trimmed MP4 clip also counts the frames that are cut off, while its duration does not.
    """
    if isinstance(source, int):
        return 0
    stated = open_video(source).get(cv2.CAP_PROP_FRAME_COUNT)
    n_frames = int(stated) if 1 <= stated < math.inf else 0  # a stream may state -1 or nan
    if isinstance(source, Path):
        with suppress(av.error.FFmpegError, IndexError), av.open(str(source)) as container:
            stream = container.streams.video[0]
            is_mp4 = "mp4" in container.format.name  # the duration of a damaged AVI file would be a guess
            if is_mp4 and stream.duration and stream.time_base and stream.average_rate:
                n_frames = min(n_frames, round(stream.duration * stream.time_base * stream.average_rate))
    return n_frames


def frame_rate(source: Path | str | int) -> float:
    """The frames per second that a video states, or 25 if it states none that is possible."""
    rate = open_video(source).get(cv2.CAP_PROP_FPS)
    return rate if 0 < rate <= MAX_FRAME_RATE else DEFAULT_FRAME_RATE


def is_live(video: Video) -> bool:
    """Whether frames come as they are filmed: of a camera, or of a URL that does not state their number."""
    return not isinstance(video.source, Path) and frame_count(video.source) == 0


def frame_stem(stem: str, number: int) -> str:
    """The stem of the files of a frame, numbered from 0; `stem` is that of the video."""
    return f"{stem}_{number:06d}"


def _input_image(stem: str, number: int, frame: np.ndarray) -> InputImage:
    stem = frame_stem(stem, number)
    return InputImage(f"{stem}.png", stem, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))


def read_frames(video: Video) -> Iterator[InputImage]:
    """Read the frames of a video one by one, until none is left or one cannot be decoded."""
    capture = open_video(video.source)
    for number in count():
        is_read, frame = capture.read()
        if not is_read:
            return
        yield _input_image(video.stem, number, frame)


def read_newest_frames(video: Video, is_stopped: Callable[[], bool]) -> Iterator[InputImage]:
    """Read the newest frame of a camera or stream, again and again, until it ends or `is_stopped()`.

    Frames that come while another one is in use are skipped, so that no delay adds up.
    """
    newest: Queue[np.ndarray] = Queue(maxsize=1)
    is_done = threading.Event()

    def keep_newest() -> None:
        capture = open_video(video.source)
        while not is_done.is_set():
            is_read, frame = capture.read()
            if not is_read:
                return
            with suppress(Empty):
                newest.get_nowait()
            newest.put_nowait(frame)

    reader = threading.Thread(target=keep_newest, daemon=True)
    reader.start()
    try:
        number, last_time = 0, time.monotonic()
        while not is_stopped():
            has_ended = not reader.is_alive() or time.monotonic() - last_time > STALL  # before the last frame
            try:
                frame = newest.get(timeout=0.1)
            except Empty:
                if has_ended:
                    return
                continue
            yield _input_image(video.stem, number, frame)
            number, last_time = number + 1, time.monotonic()
    finally:
        is_done.set()
        reader.join(timeout=1)  # a stream may wait for a frame for long


class VideoWriter:
    """A context that writes frames to an H.264 video in MP4, which appears whole or not at all.

    All browsers play it. The frames have the size of the first one, padded to even numbers: the pixel format
    takes no others.
    """

    def __init__(self, path: Path, rate: float | None) -> None:
        """`rate` is in frames per second. None: a frame is shown from the moment at which it is written."""
        self.path, self.n_frames = path, 0
        self._rate = None if rate is None else Fraction(rate).limit_denominator(MAX_RATE_DENOMINATOR)
        self._video: av.container.OutputContainer | None = None
        self._size = (0, 0)  # (width, height) of the first frame
        self._start, self._last_ms = 0.0, -1  # for the times of frames without a rate

    def __enter__(self) -> "VideoWriter":
        self._folder = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self._folder.mkdir()  # of its own, so that one call removes what is unfinished
        except OSError as error:
            raise UserError(f"{self.path} could not be written: {error.strerror}") from error
        self._temporary = self._folder / self.path.name
        return self

    def __exit__(self, *error: object) -> None:
        if self._video is not None:
            with suppress(av.error.FFmpegError):  # `finish` reports it
                self._video.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def write(self, frame: np.ndarray) -> None:
        """Append a frame, RGB uint8 (H, W, 3). Raises UserError."""
        if self._video is not None and frame.shape[1::-1] != self._size:  # a few videos change their size
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
        bottom, right = frame.shape[0] % 2, frame.shape[1] % 2
        padded = cv2.copyMakeBorder(frame, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
        try:
            if self._video is None:
                self._size = frame.shape[1], frame.shape[0]
                self._open(padded.shape[1], padded.shape[0])
            assert self._video is not None
            video_frame = av.VideoFrame.from_ndarray(padded.astype(np.uint8, copy=False), format="rgb24")
            if self._rate is None:
                self._last_ms = max(self._last_ms + 1, round(1000 * (time.monotonic() - self._start)))
                video_frame.pts, video_frame.time_base = self._last_ms, Fraction(1, 1000)
            self._video.mux(self._stream.encode(video_frame))
        except av.error.FFmpegError as error:
            raise self._cannot_write(error) from error
        self.n_frames += 1

    def _open(self, width: int, height: int) -> None:
        self._video = av.open(str(self._temporary), "w")
        self._stream = self._video.add_stream("libx264", rate=self._rate or Fraction(DEFAULT_FRAME_RATE))
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.options = {"preset": "veryfast", "crf": "20"}  # fast, and masks keep clear edges
        if self._rate is None:
            self._stream.codec_context.time_base = Fraction(1, 1000)
            self._start = time.monotonic()

    def finish(self) -> None:
        """Give the video its name, once it opens again with all frames; raises UserError."""
        if self._video is None:
            return
        try:
            self._video.mux(self._stream.encode())
            self._video.close()
            with av.open(str(self._temporary)) as written:
                found = written.streams.video[0].frames
        except av.error.FFmpegError as error:
            raise self._cannot_write(error) from error
        if found != self.n_frames:
            raise UserError(
                f"{self.path} could not be written: of {self.n_frames} frames it holds {found}; "
                "possibly the disk is full"
            )
        try:
            self._temporary.replace(self.path)
        except OSError as error:
            raise UserError(f"{self.path} could not be written: {error.strerror}") from error

    def _cannot_write(self, error: av.error.FFmpegError) -> UserError:
        return UserError(
            f"{self.path} could not be written ({error.strerror}); "
            "if the disk has space, predict a folder of the frames instead"
        )
