"""Command-line flags: numbers, paths, and what is answered before slow imports."""

import argparse
import signal
import sys
from pathlib import Path

import pytest
from conftest import run_process

from base import flag_types

ROOT = Path(__file__).parent.parent
SLOW = ("torch", "cv2", "scipy", "skimage", "segment_anything", "tensorboard", "pydantic")


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


def test_home_and_variables_in_a_path_are_expanded_unless_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert flag_types.path("~/a") == flag_types.path("$HOME/a") == tmp_path / "home/a"
    assert flag_types.path("a/~") == Path("a/~") and flag_types.path("$NO_SUCH/a") == Path("$NO_SUCH/a")
    Path("$HOME").mkdir()
    assert flag_types.path("$HOME") == Path("$HOME")


def test_an_empty_path_is_not_the_current_directory():
    for parse in (flag_types.path, flag_types.source):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a path, got ''"):
            parse("")


def run_command(command, modules, code, *argv):
    """Run a command where the import of slow modules runs `code` instead."""
    modules.mkdir()
    for name in SLOW:
        (modules / f"{name}.py").write_text(code)
    return run_process(sys.executable, ROOT / command, *argv, PYTHONPATH=modules)


@pytest.mark.parametrize("command", ["finetune.py", "predict.py", "export.py"])
def test_help_and_wrong_flags_are_answered_before_slow_imports(tmp_path, command):
    fail = "raise AssertionError(__name__)"
    process = run_command(command, tmp_path / "1", fail, "--help")
    assert process.returncode == 0 and "--checkpoint" in process.stdout, process.stderr
    process = run_command(command, tmp_path / "2", fail, "--nonsense")
    assert process.returncode == 2 and "usage: " in process.stderr and "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("finetune.py", "config"),
        ("finetune.py", "checkpoint"),
        ("predict.py", "input"),
        ("export.py", "checkpoint"),
    ],
)
def test_a_missing_file_is_named_before_slow_imports(tmp_path, command, flag):
    flags = {
        "finetune.py": {"config": ROOT / "configs/demo.yaml", "checkpoint": ROOT / "README.md"},
        "predict.py": {"checkpoint": ROOT / "README.md", "input": ROOT / "demo", "output": tmp_path / "out"},
        "export.py": {"checkpoint": ROOT / "README.md", "output": tmp_path / "out", "format": "hf"},
    }[command] | {flag: tmp_path / "none"}
    argv = [part for name, value in flags.items() for part in (f"--{name}", value)]
    process = run_command(command, tmp_path / "modules", "raise AssertionError(__name__)", *argv)
    assert process.returncode == 2
    assert process.stderr == f"error: --{flag} {tmp_path / 'none'}: no such file or folder\n"


@pytest.mark.parametrize("command", ["finetune.py", "predict.py", "export.py"])
def test_ctrl_c_during_the_imports_shows_no_traceback(tmp_path, command):
    flags = {
        "finetune.py": ("-c", tmp_path),
        "predict.py": ("--checkpoint", tmp_path, "--input", tmp_path, "--output", "x"),
        "export.py": ("--checkpoint", tmp_path, "--output", "x", "--format", "hf"),
    }[command]
    interrupt = "import signal; signal.raise_signal(signal.SIGINT); print('goes on')"
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        process = run_command(command, tmp_path / "modules", interrupt, *flags)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert (process.returncode, process.stdout, process.stderr) == (-signal.SIGINT, "", "")
