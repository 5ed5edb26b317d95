"""The check of all files at the start of a run, and the cache of its results.

The facts of a file are what the check records of it. They depend only on its bytes and on the code that reads
it, and are kept under a hash of both. A later check then decodes only new and changed files.
"""

import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from threading import Condition
from typing import Any

import cv2
import numpy as np
import PIL
from PIL import features
from tqdm import tqdm

from base.atomic import write_atomically
from base.errors import UserError
from imaging.files import MAX_PIXELS, FileError, check_size, read_image
from imaging.masks import MaskReading
from imaging.pairing import Pair, interpret_pair

# Pixels that all threads decode at once. Decoding takes about 9 bytes per pixel, so this is 0.9 GB: four
# pairs of 12 megapixels. A larger pair is decoded alone.
PIXELS_AT_ONCE = 100_000_000
BAR_DELAY = 1.0  # seconds until the progress bar is shown: a short check has none


@dataclass(frozen=True)
class FileInfo:
    """What `check_files` records of a file.

    size: (h, w) in pixels.
    digest: hash of the decoded pixels.
    foreground: of a mask, the fraction of its pixels that are foreground; else None.
    level, colors: of a mask, see `imaging.masks.MaskReading`.
    """

    size: tuple[int, int]
    digest: str
    foreground: float | None = None
    level: int | None = None
    colors: frozenset[tuple[int, int, int]] = frozenset()


# --- Checking ----------------------------------------------------------------------------------


def check_files(
    items: Iterable[Pair | Path], max_pixels: int = MAX_PIXELS, *, show_progress: bool = False
) -> tuple[dict[Pair | Path, dict[Path, FileInfo]], list[str]]:
    """Check every file of the pairs and backgrounds once, in several threads.

    Files are decoded unless an earlier check kept the facts of the same bytes. An exception, such as
    KeyboardInterrupt, ends the check once the files that are being decoded are done; what was recorded so far
    is kept.

    Returns:
        What was recorded of the files of each intact item, and one message for each item with a fault: a
        file that cannot be decoded or is too large, a mask that is not binary, a pair that does not fit.
    """
    unique = list(dict.fromkeys(items))
    infos: dict[Pair | Path, dict[Path, FileInfo]] = {}
    faults: list[str] = []
    cache, budget = _Cache(), _PixelBudget(PIXELS_AT_ONCE)
    check = partial(_check, known=cache.known, max_pixels=max_pixels, budget=budget)
    progress = tqdm(
        total=len(unique),
        desc="checking the files",
        delay=BAR_DELAY,
        leave=False,
        dynamic_ncols=True,
        disable=not show_progress,
    )
    with progress, ThreadPoolExecutor() as pool:
        try:
            for item, (key, checked) in zip(unique, pool.map(check, unique), strict=True):
                if isinstance(checked, str):
                    faults.append(checked)
                else:
                    infos[item] = dict(zip(_paths(item), checked, strict=True))
                    cache.add(key, checked)
                progress.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            budget.close()
            cache.save()
    return infos, faults


def _paths(item: Pair | Path) -> tuple[Path, ...]:
    return (item,) if isinstance(item, Path) else (item.image_path, item.mask_path)


def _check(
    item: Pair | Path, known: dict[str, list[FileInfo]], max_pixels: int, budget: "_PixelBudget"
) -> tuple[str | None, str | list[FileInfo]]:
    """Check one item of `check_files`.

    Returns its key, or None if its facts may not be kept; and its fault or the facts of each of its files.
    """
    key = _key(item)
    kept = known.get(key) if key else None
    if kept and all(info.size[0] * info.size[1] <= max_pixels for info in kept):
        return key, kept
    try:
        n_pixels = sum(check_size(path, max_pixels) for path in _paths(item))
        with budget.take(n_pixels):
            infos = _decode(item)
    except FileError as error:
        return None, str(error)
    return (key if _key(item) == key else None), infos  # None: a file was changed meanwhile


def _decode(item: Pair | Path) -> list[FileInfo]:
    if isinstance(item, Path):
        return [_file_info(read_image(item))]
    image, reading = interpret_pair(item)
    return [_file_info(image), _file_info(reading.mask, reading)]


def _file_info(array: np.ndarray, reading: MaskReading | None = None) -> FileInfo:
    pixels = hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16)
    pixels.update(repr(array.shape).encode())
    size = (array.shape[0], array.shape[1])
    if reading is None:
        return FileInfo(size, pixels.hexdigest())
    return FileInfo(size, pixels.hexdigest(), float(array.mean()), reading.level, reading.colors)


class _PixelBudget:
    """Limits the pixels that all threads decode at once. An item with more than that is decoded alone."""

    def __init__(self, limit: int) -> None:
        self.limit, self.in_use, self.is_closed = limit, 0, False
        self.changed = Condition()

    @contextmanager
    def take(self, n_pixels: int) -> Iterator[None]:
        """Wait until there is room for the pixels; raises CancelledError once the budget is closed."""
        n_pixels = min(n_pixels, self.limit)
        with self.changed:
            self.changed.wait_for(lambda: self.is_closed or self.in_use + n_pixels <= self.limit)
            if self.is_closed:
                raise CancelledError
            self.in_use += n_pixels
        try:
            yield
        finally:
            with self.changed:
                self.in_use -= n_pixels
                self.changed.notify_all()

    def close(self) -> None:
        """Keep threads from starting to decode."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()


# --- Cache -------------------------------------------------------------------------------------

MAX_KEPT_ITEMS = 100_000  # about 20 MB; more only if one check has more, otherwise the oldest are dropped
SAVE_INTERVAL = 60  # seconds; a check that is killed loses no more


def cache_file() -> Path:
    """Where facts are kept. Raises RuntimeError if the user has no home folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(folder).expanduser() / "finetune_sam_cables" / "checked_files.json"


class _Cache:
    """What earlier checks recorded of intact items, by `_key`.

    A file that is missing, damaged or foreign counts as empty, and is replaced. Writes are atomic. If two
    checks write at the same time, the facts of one are lost, and its files are decoded again at the next
    start.
    """

    def __init__(self) -> None:
        records = _load_records()
        self.known = {key: [_to_info(*record) for record in entry] for key, entry in records.items()}
        self.used: dict[str, list[FileInfo]] = {}
        self.has_new, self.is_writable, self.saved_at = False, True, time.monotonic()

    def add(self, key: str | None, infos: list[FileInfo]) -> None:
        """Keep the facts of an item, if it has a key."""
        if key is None:
            return
        self.used[key] = infos
        self.has_new |= key not in self.known
        if time.monotonic() - self.saved_at > SAVE_INTERVAL:
            self.save()

    def save(self) -> None:
        """Write what is new; warns once if that is not possible."""
        self.saved_at = time.monotonic()
        if not self.has_new or not self.is_writable:
            return
        used = {key: [_to_record(info) for info in infos] for key, infos in self.used.items()}
        others = [entry for entry in _load_records().items() if entry[0] not in used]
        kept = [*others, *used.items()][-max(MAX_KEPT_ITEMS, len(used)) :]
        body = json.dumps(dict(kept), separators=(",", ":")).encode()
        try:
            path = cache_file()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: file.write(_checksum(body) + b"\n" + body))
            self.has_new = False
        except (OSError, RuntimeError, UserError) as error:
            self.is_writable = False
            warnings.warn(
                f"what the check found cannot be kept, so the next start decodes all files again ({error}); "
                "the environment variable XDG_CACHE_HOME chooses another folder",
                stacklevel=2,
            )


def _load_records() -> dict[str, list[list[Any]]]:
    try:
        checksum, _, body = cache_file().read_bytes().partition(b"\n")
    except (OSError, RuntimeError):
        return {}
    return json.loads(body) if checksum == _checksum(body) else {}


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16, person=b"checked files 1").hexdigest().encode()


def _to_record(info: FileInfo) -> list[Any]:
    return [info.size, info.digest, info.foreground, info.level, sorted(info.colors)]


def _to_info(
    size: list[int], digest: str, foreground: float | None, level: int | None, colors: list[list[int]]
) -> FileInfo:
    as_tuples = frozenset((red, green, blue) for red, green, blue in colors)
    return FileInfo((size[0], size[1]), digest, foreground, level, as_tuples)


def _key(item: Pair | Path) -> str | None:
    """Hash of all that the facts of an item depend on; None if a file cannot be read."""
    key = hashlib.blake2b(_reading_rules(), digest_size=16)
    key.update(b"background" if isinstance(item, Path) else repr(item.mask_values).encode())
    for path in _paths(item):
        content = hashlib.blake2b(digest_size=16)
        try:
            if not path.is_file():  # opening a pipe would wait forever
                return None
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    content.update(block)
        except OSError:
            return None
        key.update(content.digest())
    return key.hexdigest()


@lru_cache(maxsize=1)
def _reading_rules() -> bytes:
    """Hash of the code that reads files, and of the versions of the libraries that decode them."""
    versions = (PIL.__version__, features.version("jpg"), np.__version__, cv2.__version__)
    rules = hashlib.blake2b(repr(versions).encode(), digest_size=16)
    for name in ("files.py", "masks.py", "pairing.py", "checking.py"):
        rules.update(Path(__file__).with_name(name).read_bytes())
    return rules.digest()
