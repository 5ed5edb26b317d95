"""Types of command-line flags for argparse: numbers in a range."""

import argparse
from collections.abc import Callable
from typing import Any


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
