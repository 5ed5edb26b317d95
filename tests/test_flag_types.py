"""Number types of command-line flags."""

import argparse

import pytest

from base import flag_types


@pytest.mark.parametrize(
    ("parse", "accepted", "refused"),
    [
        (flag_types.positive_int, {"1": 1, "12": 12}, ["0", "-1", "1.5", "two", ""]),
        (flag_types.count, {"0": 0, "3": 3}, ["-1", "0.5"]),
        (flag_types.positive, {"1e-3": 0.001, "2": 2.0}, ["0", "-1", "inf", "nan", "x"]),
        (flag_types.not_negative, {"0": 0.0, "2.5": 2.5}, ["-1e-9", "inf", "nan"]),
        (flag_types.fraction, {"0.5": 0.5}, ["0", "1", "nan"]),
        (flag_types.decay, {"1": 1.0, "0.9": 0.9}, ["0", "1.1", "nan"]),
    ],
)
def test_numbers_in_range_are_parsed_and_others_are_named(parse, accepted, refused):
    assert {text: parse(text) for text in accepted} == accepted
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=rf"expected a .*, got '{text}'"):
            parse(text)
