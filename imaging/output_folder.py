"""The folder that predict.py writes to. A list names its files, and only these are replaced."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from base import atomic
from base.errors import UserError
from imaging.files import format_list

LIST_NAME = "predictions.json"
# Folders with a file or two per image.
MASKS, OVERLAYS, PROBABILITIES = "masks", "overlays", "probabilities"
CENTERLINES, INSTANCES = "centerlines", "instances"
FOLDERS = (MASKS, OVERLAYS, PROBABILITIES, CENTERLINES, INSTANCES)
SINGLE_FILES = ("polygons.json", "rle.json", "measures.csv", "worst.jpg")


class OutputFolder:
    """A folder of predictions, with a list of the files that were written to it.

    `LIST_NAME` holds the list. A file is listed before it is written, so that even a killed run leaves no
    file that the list lacks. The next run removes the listed files first, and nothing else.
    """

    def __init__(self, path: Path, inputs: Iterable[Path]) -> None:
        """Check the folder. Changes nothing.

        Args:
            path: the folder, which may be missing.
            inputs: files and folders that are read.

        Raises:
            UserError: an input is in the folder, or the folder holds a file that is not listed, or one that
                was changed after it was written.
        """
        self.path = path
        self._about: dict[str, Any] = {}
        self._require_apart(inputs)
        self._digests = self._read_list()  # by name; None for a file that may not have been written
        self._require_only_listed()

    def start(self, about: Mapping[str, Any], names: Iterable[str]) -> int:
        """Remove the files of an earlier prediction, and list those that will be written.

        Args:
            about: what else the list says, as JSON values.
            names: files to write, relative to the folder, with "/".

        Returns:
            How many files were removed. Raises UserError.
        """
        try:
            removed = sum(self._remove(name) for name in self._digests)
            self._remove_temporary()
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._about, self._digests = dict(about), {}
        self.announce(names)
        return removed

    def announce(self, names: Iterable[str]) -> None:
        """List files before they are written; raises UserError."""
        new = [name for name in names if name not in self._digests]
        if not new:
            return
        self._digests |= dict.fromkeys(new)
        self._write_list()
        try:
            for name in new:
                (self.path / name).parent.mkdir(exist_ok=True)
        except OSError as error:
            raise self._cannot_write(error) from error

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all; raises UserError."""
        self.announce([name])
        atomic.write_atomically(self.path / name, lambda file: file.write(content))
        self._digests[name] = _digest(content)

    def add(self, name: str) -> None:
        """Note that the file `name`, which was announced, has been written by other code."""
        self._digests[name] = _digest((self.path / name).read_bytes())

    def finish(self) -> None:
        """List exactly the files that exist; raises UserError."""
        self._digests = {name: digest for name, digest in self._digests.items() if digest is not None}
        self._write_list()

    # --- The list -----------------------------------------------------------------------------

    def _write_list(self) -> None:
        document = {**self._about, "files": self._digests}
        atomic.write_text(self.path / LIST_NAME, json.dumps(document, indent=1))

    def _read_list(self) -> dict[str, str | None]:
        """The listed files and their digests; raises UserError for a list that this class has not written."""
        path = self.path / LIST_NAME
        if not os.path.lexists(path):
            return {}
        try:
            digests = json.loads(path.read_bytes())["files"]
            if not all(_may_be_listed(name) for name in digests.keys()):  # noqa: SIM118, for any other type
                raise ValueError("it names other files")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"--output {self.path}: {LIST_NAME} in it is no list of predict.py ({error}); "
                "choose another folder"
            ) from error
        return digests

    # --- Checks -------------------------------------------------------------------------------

    def _require_apart(self, inputs: Iterable[Path]) -> None:
        """Raise UserError if an input is in this folder, also through a link."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(
                f"--output {self.path}: cannot be created, because it is a file; expected a folder"
            )
        try:
            folder = self.path.resolve()
            for path in inputs:
                if path.resolve().is_relative_to(folder):
                    raise UserError(
                        f"--output {self.path}: it contains {path}, which is an input; choose a new folder, "
                        f"such as --output {self.path / 'predictions'}"
                    )
            for name in FOLDERS:
                if not (folder / name).resolve().is_relative_to(folder):
                    raise UserError(f"--output {self.path}: {name}/ in it is a link to another folder")
        except (OSError, RuntimeError) as error:  # a loop of links
            raise UserError(f"--output {self.path}: cannot be read ({error})") from error

    def _require_only_listed(self) -> None:
        """Raise UserError if a file is not listed, or was changed since."""
        try:
            found = [f"{folder}/{name}" for folder in FOLDERS for name in _visible(self.path / folder)]
            found += [name for name in SINGLE_FILES if os.path.lexists(self.path / name)]
            foreign = [name for name in found if name not in self._digests]
            changed = [name for name in found if self._is_changed(name)]
        except OSError as error:
            raise self._cannot_write(error) from error
        for names, fault in ((foreign, "not written"), (changed, "changed after they were written")):
            if names:
                raise UserError(
                    f"--output {self.path}: it holds {len(names)} files that were {fault} by predict.py; "
                    f"choose a new folder, or move them away:\n  {format_list(names)}"
                )

    def _is_changed(self, name: str) -> bool:
        digest = self._digests.get(name)
        return digest is not None and _digest((self.path / name).read_bytes()) != digest

    def _cannot_write(self, error: OSError) -> UserError:
        reason = error.strerror or error
        return UserError(f"--output {self.path}: cannot be created, read or written to ({reason})")

    # --- Removal ------------------------------------------------------------------------------

    def _remove(self, name: str) -> bool:
        path = self.path / name
        exists = os.path.lexists(path)
        path.unlink(missing_ok=True)
        return exists

    def _remove_temporary(self) -> None:
        """Remove what a killed run left of unfinished listed files, and then folders without a file."""
        for folder in FOLDERS:
            path = self.path / folder
            for entry in path.iterdir() if path.is_dir() else ():
                final_name = entry.name[1:].rsplit(".", 2)[0]  # of .NAME.PROCESS.tmp
                if entry.name.startswith(".") and entry.suffix == ".tmp":
                    if f"{folder}/{final_name}" not in self._digests:
                        continue
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _may_be_listed(name: str) -> bool:
    """Whether a list may name this file: one of `SINGLE_FILES`, or a file right in one of `FOLDERS`."""
    folder, slash, file_name = name.partition("/")
    if not slash:
        return name in SINGLE_FILES
    return folder in FOLDERS and file_name != ".." and Path(file_name).name == file_name


def _visible(folder: Path) -> list[str]:
    """The names in a folder that are not hidden, sorted; none if there is no such folder."""
    if not os.path.lexists(folder):
        return []
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
