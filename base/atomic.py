"""Write files whole or not at all, and only where there is space."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from base.errors import UserError

MIB = 1 << 20
MAX_NAME = 200  # bytes of a name that a temporary name repeats; file systems allow 255 in all


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that takes the name `path` only once it is safely on disk.

    Whatever goes wrong, `path` holds its old content or the new, never a part.
    Raises UserError, which names `path`.
    """
    name = os.fsdecode(os.fsencode(path.name)[:MAX_NAME])
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":  # elsewhere a folder cannot be opened to sync the rename itself
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} could not be written, and is as it was: {reason}") from error
    finally:
        with suppress(OSError):  # what went wrong above says more
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all. Raises UserError as `write_atomically` does."""
    write_atomically(path, lambda file: file.write(text.encode()))


def require_free_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise UserError unless the disk of `folder` (or of its nearest existing parent) has the space."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"{purpose} would take {needed_bytes / MIB:.0f} MiB on the disk of {folder.resolve()}, "
            f"which has {free / MIB:.0f} MiB left"
        )
