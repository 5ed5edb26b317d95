"""Atomic writes, and the check of free disk space."""

import os

import pytest

from base import atomic
from base.errors import UserError


def test_a_written_file_has_its_new_content_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")
    atomic.write_text(path, "né\n")
    assert path.read_bytes() == "né\n".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(b"old")
    seen = []

    def write(file):
        file.write(b"new")
        file.flush()
        seen.append(path.read_bytes())

    atomic.write_atomically(path, write)
    assert seen == [b"old"] and path.read_bytes() == b"new"


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("ü" * 125 + ".png")  # 254 bytes
    atomic.write_text(path, "new")
    assert os.listdir(tmp_path) == [path.name]


def test_a_write_into_what_is_no_folder_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"a\.txt could not be written.*Not a directory"):
        atomic.write_text(tmp_path / "file" / "a.txt", "new")


@pytest.mark.parametrize(
    ("error", "message"),
    [(OSError(28, "No space left on device"), "No space left"), (RuntimeError("torch\nat line 1"), "torch$")],
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error, message):
    path = tmp_path / "w.pth"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the n")
        raise error

    with pytest.raises(UserError, match=rf"w\.pth could not be written.*{message}"):
        atomic.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["w.pth"]


def test_a_bug_in_the_writer_is_raised_as_it_is(tmp_path):
    def fail(file):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        atomic.write_atomically(tmp_path / "w.pth", fail)
    assert os.listdir(tmp_path) == []


def test_too_little_disk_space_is_refused(tmp_path, monkeypatch):
    usage = atomic.shutil.disk_usage(tmp_path)
    limited = usage._replace(free=1000 * atomic.MIB)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda folder: limited)
    atomic.require_free_space(tmp_path / "not" / "yet", 1000 * atomic.MIB, "it")
    with pytest.raises(UserError, match=r"it would take 1001 MiB on the disk of .*, which has 1000 MiB left"):
        atomic.require_free_space(tmp_path / "not" / "yet", 1001 * atomic.MIB, "it")
