"""A test set that is split off, and runs that end by --patience or --minutes."""

import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from conftest import run_finetune, run_tiny, scalars

import checkpoint
import finetune
import resume
from train_state import learning_rate


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- --val_percentage ---


def test_a_run_tests_on_the_pairs_that_are_held_out(tiny_weights, config_file, capsys):
    config = config_file(with_test=False)
    assert (
        run_tiny(config, tiny_weights, "-e", 1, "-b", 1, "--test_interval", 99, "--val_percentage", 30) == 0
    )
    n_train = int(re.search(r"1 epochs of (\d) samples", capsys.readouterr().out)[1])
    assert 0 < n_train < 6 and [step for step, _ in scalars("exp/run")["test/iou"]] == [0, n_train]
    assert run_finetune("--resume", "-n", "run", "-e", 2) == 0
    assert run_finetune("--resume", "-n", "run", "-e", 3, "--val_percentage", 50) == 2
    assert "--val_percentage: was 30.0, is now 50.0" in capsys.readouterr().err
    assert run_tiny(config_file(), tiny_weights, "-n", "other", "--val_percentage", 30) == 2
    assert "has a test set already" in capsys.readouterr().err
    assert run_tiny(config, tiny_weights, "-n", "other", "--val_percentage", 0.2) == 2
    assert "a percentage from 1 to 90" in capsys.readouterr().err and not Path("exp/other").exists()


# --- --patience ---

# 6 samples in batches of 2, 3 iterations an epoch. A tiny rate changes no test.
FLAGS = ("-b", 2, "-e", 9, "--lr", 1e-12, "--test_interval", 2, "--log_interval", 1)


def last_weights(name):
    return checkpoint.load_weights(Path(f"exp/{name}/checkpoints/last.pth"))


def test_tests_without_a_gain_end_the_run_also_when_it_is_resumed(
    tiny_weights, config_file, at_iteration, capsys
):
    flags = (*FLAGS, "--patience", 3)
    assert run_tiny(config_file(), tiny_weights, *flags, "-n", "whole") == 0
    assert "the last 3 tests brought no gain: --patience ends the run" in capsys.readouterr().out
    assert [step for step, _ in scalars("exp/whole")["test/iou"]] == [0, 2, 4, 6, 8]
    at_iteration(7, lambda batch, net: os.kill(os.getpid(), signal.SIGTERM))
    assert run_tiny(config_file(), tiny_weights, *flags) == 143
    assert not Path("exp/run/checkpoints/last.pth").exists()
    assert run_finetune("--resume", "-n", "run") == 0
    assert scalars("exp/run")["test/iou"] == scalars("exp/whole")["test/iou"]
    whole, resumed = last_weights("whole"), last_weights("run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    capsys.readouterr()
    assert run_finetune("--resume", "-n", "run") == 2
    assert "give a larger --patience" in capsys.readouterr().err
    assert run_finetune("--resume", "-n", "run", "--patience", 4) == 0
    assert [step for step, _ in scalars("exp/run")["test/iou"]] == [0, 2, 4, 6, 8, 10]


def test_patience_needs_a_test_set(tiny_weights, config_file, capsys):
    assert run_tiny(config_file(with_test=False), tiny_weights, "--patience", 2) == 2
    assert "--patience 2: needs a test set" in capsys.readouterr().err and not Path("exp").exists()


# --- --minutes ---


def test_a_run_of_minutes_measures_its_speed_once_and_resumes_exactly(
    tiny_weights, config_file, at_iteration, monkeypatch, capsys
):
    monkeypatch.setattr(finetune.Budget, "epochs", lambda budget, done, iteration, *_: 7 * (iteration == 5))
    flags = (*FLAGS, "--minutes", 30, "--lr", 1e-2, "--warmup_steps", 2)
    assert run_tiny(config_file(), tiny_weights, *flags, "-n", "whole") == 0
    output = capsys.readouterr().out
    assert "epochs of 6 samples, as many as fit into 30 minutes" in output
    assert "--minutes 30: 7 epochs fit, 21 iterations" in output
    steps = [5e-3, 1e-2] + [1e-2] * 3  # as if the run had no end, until it has one after iteration 5
    steps += [learning_rate(s, total_steps=21, peak=1e-2, warmup=2, power=1.0) for s in range(5, 21)]
    rates = scalars("exp/whole")["train/lr"]
    assert rates == [(step, pytest.approx(rate, rel=1e-4)) for step, rate in enumerate(steps, 1)]
    at_iteration(9, lambda batch, net: os.kill(os.getpid(), signal.SIGTERM))
    assert run_tiny(config_file(), tiny_weights, *flags) == 143
    monkeypatch.setattr(finetune.Budget, "epochs", lambda *_: 99)  # must not be asked again
    assert run_finetune("--resume", "-n", "run") == 0
    assert "7 epochs of 6 samples: 21 iterations" in capsys.readouterr().out
    assert scalars("exp/run")["train/lr"] == rates
    whole, resumed = last_weights("whole"), last_weights("run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert run_finetune("--resume", "-n", "run") == 2
    assert "--minutes 30 asks for 21: start a new run" in capsys.readouterr().err


def test_a_run_of_minutes_ends_in_time(tiny_weights, config_file):
    assert run_tiny(config_file(), tiny_weights, "-b", 2, "--minutes", 0.05, "--test_interval", 1000) == 0
    state = resume.load_resume_state(Path("exp/run/resume.pth"))["train_state"]["counters"]
    assert state["epochs"] >= 1 and state["iteration"] == 3 * state["epochs"]
    assert math.isfinite(scalars("exp/run")["test/iou"][-1][1])
