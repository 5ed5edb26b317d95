"""Command-line flags: types for argparse, and reading flags before slow imports."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Larger images are refused before they are decoded: a file of a few kilobytes can claim gigabytes.
MAX_PIXELS = 100_000_000
MIN_TILE = 16  # smallest side of a tile, in pixels


def answer_first(parse_args: Callable[[], argparse.Namespace], inputs: Sequence[str]) -> None:
    """Read the command line of a script before its slow imports; `--help` and wrong flags end the process.

    A path that does not exist is a wrong value of the flags that `inputs` names. From here on, Ctrl-C ends
    the process at once and without a traceback, until the script handles it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a background job of a shell
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    args = vars(parse_args())
    for name in inputs:
        value = args[name]
        if isinstance(value, Path) and not os.path.lexists(value):
            print(f"error: --{name} {value}: no such file or folder", file=sys.stderr)
            sys.exit(2)


def path(text: str) -> Path:
    """An argparse type for paths. If `text` itself does not exist, `~` and `$NAME` in it are expanded."""
    if not text:  # as from "$NAME" in a shell without this variable; Path("") is the current directory
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(text if os.path.lexists(text) else expand(text))


def source(text: str) -> Path | str | int:
    """An argparse type for what is predicted: the number of a camera, a URL, or a path."""
    if "://" in text:
        return text
    is_camera = text.isascii() and text.isdecimal() and not os.path.lexists(text)
    return int(text) if is_camera else path(text)


def expand(text: str) -> str:
    """Replace a leading `~` and every `$NAME` of a variable that exists, as a shell does."""
    return os.path.expandvars(os.path.expanduser(text))


def number(
    parse: Callable[[str], Any], is_valid: Callable[[Any], bool], expected: str
) -> Callable[[str], Any]:
    """An argparse type for numbers that satisfy `is_valid`."""

    def convert(text: str) -> Any:
        try:
            value = parse(text)
        except ValueError:
            value = None
        if value is None or not is_valid(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return convert


positive_int = number(int, lambda value: value >= 1, "a whole number of at least 1")
count = number(int, lambda value: value >= 0, "a whole number of at least 0")
positive = number(float, lambda value: 0 < value < float("inf"), "a number above 0")
not_negative = number(float, lambda value: 0 <= value < float("inf"), "a number of at least 0")
fraction = number(float, lambda value: 0 < value < 1, "a number between 0 and 1, both excluded")
decay = number(float, lambda value: 0 < value <= 1, "a number above 0, at most 1")
percentage = number(
    float, lambda value: value == 0 or 1 <= value <= 90, "0 or a percentage from 1 to 90, where 20 is a fifth"
)
