"""Runs that are killed, stopped, starved or fed with garbage: nothing is lost, and all is said."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_finetune import run_tiny, scalars

import checkpoint
import dataset
import finetune

TINY_RUN = Path(__file__).parent / "tiny_run.py"
# 9 samples in batches of 2: 5 iterations an epoch, in optimizer steps of 2, 2 and 1 batches.
FLAGS = (
    "-e", 4, "-b", 2, "--virtual_batch_size", 2, "--prompt", "mixed", "--test_interval", 6,
    "--log_interval", 3, "--lr", 1e-2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, "RETRY_AFTER", 0.0)


@pytest.fixture
def config(config_file):
    return config_file(percentage=1.5)


@pytest.fixture
def in_iteration(monkeypatch):
    """`in_iteration(n, act)` calls act() in the n-th iteration of the next run."""

    def arrange(number, act):
        calls, dice_loss = [], finetune.dice_loss

        def counted(*args):
            calls.append(args)
            if len(calls) == number:
                act()
            return dice_loss(*args)

        monkeypatch.setattr(finetune, "dice_loss", counted)

    return arrange


def results(name="run"):
    weights = checkpoint.load_weights(Path(f"exp/{name}/checkpoints/last.pth"))
    curves = scalars(f"exp/{name}")
    return weights, {tag: curves[tag] for tag in curves.keys() - {"train/images_per_s", "train/data_wait"}}


def assert_same_results(ours, expected):
    assert all(torch.equal(ours[0][key], expected[0][key]) for key in expected[0])
    assert ours[1] == expected[1]


@pytest.fixture
def uninterrupted(config, tiny_weights):
    assert run_tiny(config, tiny_weights, *FLAGS, "-n", "whole") == 0
    return results("whole")


def run_apart(config, weights, *argv, **environment):
    """The command in a process of its own, where `tiny_run.py` says what else happens to it."""
    command = [sys.executable, TINY_RUN, "-c", config, "--model_type", "tiny", "--checkpoint", weights]
    command += ["-n", "run", "--device", "cpu", "--amp", "off", *FLAGS, *argv]
    environment = {name: str(value) for name, value in environment.items()}
    return subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_run_killed_again_and_again_ends_as_if_it_were_not(config, tiny_weights, uninterrupted):
    options = ["--num_workers", 1, "--resume_interval", 1e-9]  # a state at every iteration
    left, rng = 20, random.Random(0)
    while left > 5:
        kill_in = rng.randint(2, 8)
        process = run_apart(config, tiny_weights, *options, KILL_IN=kill_in)
        assert process.returncode == -signal.SIGKILL, process.stderr
        left -= kill_in - 1
        options += ["--resume"] * ("--resume" not in options)
    process = run_apart(config, tiny_weights, *options)
    assert process.returncode == 0, process.stderr
    assert f"resumed     after iteration {20 - left}" in process.stdout
    assert_same_results(results(), uninterrupted)
    assert not list(Path("exp/run").rglob("*.tmp"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_iteration(
    config, tiny_weights, uninterrupted, in_iteration, capsys, number, code
):
    in_iteration(8, lambda: os.kill(os.getpid(), number))  # amid an optimizer step
    assert run_tiny(config, tiny_weights, *FLAGS) == code
    assert "--exp_name run --resume" in capsys.readouterr().err
    assert not Path("exp/run/checkpoints/last.pth").exists()
    assert run_tiny(config, tiny_weights, *FLAGS, "--resume") == 0
    assert "resumed     after iteration 8" in capsys.readouterr().out
    assert_same_results(results(), uninterrupted)
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_only_the_last_epochs_are_kept(config, tiny_weights):
    assert run_tiny(config, tiny_weights, *FLAGS, "--save_interval", 1, "--keep_last", 2) == 0
    files = {path.name for path in Path("exp/run/checkpoints").iterdir()}
    assert files == {"epoch_0003.pth", "epoch_0004.pth", "best.pth", "last.pth"}


def test_a_full_disk_leaves_the_last_state(config, tiny_weights, uninterrupted):
    process = run_apart(config, tiny_weights, FULL_IN=8)
    assert process.returncode == 1, process.stderr
    assert "error: writing to exp/run failed: " in process.stderr, process.stderr
    assert "--exp_name run --resume" in process.stderr
    assert not list(Path("exp/run").rglob("*.tmp"))
    assert run_tiny(config, tiny_weights, *FLAGS, "--resume") == 0
    assert_same_results(results(), uninterrupted)


# --- numerical faults ---


def spoil_losses(monkeypatch, first, last):
    calls, focal_loss = [], finetune.focal_loss

    def spoilt(logits, *args, **kwargs):
        calls.append(args)
        loss = focal_loss(logits, *args, **kwargs)
        return loss * float("nan") if first <= len(calls) <= last else loss

    monkeypatch.setattr(finetune, "focal_loss", spoilt)


def test_a_step_that_is_not_finite_is_left_out(config, tiny_weights, monkeypatch):
    spoil_losses(monkeypatch, 7, 7)
    assert run_tiny(config, tiny_weights, *FLAGS) == 0
    weights, curves = results()
    assert all(weight.isfinite().all() for weight in weights.values())
    assert curves["train/bad_steps"][-1][1] == 1
    assert curves["test/iou"][-1][1] > 0


def test_many_such_steps_end_the_run(config, tiny_weights, monkeypatch, capsys):
    spoil_losses(monkeypatch, 8, 99)
    assert run_tiny(config, tiny_weights, *FLAGS, "--max_bad_steps", 3) == 1
    error = capsys.readouterr().err
    # Steps end after the iterations 2 4 5 7 9 10 12: the third bad one is the last of these.
    assert "iteration 12: loss or gradient was not finite in 3 steps in a row" in error
    assert "exp/run/checkpoints/best.pth" in error
    assert re.search(r"the last batch held \S+/cables/imgs/\d\.png", error)


def test_weights_that_are_not_finite_are_never_the_best(config, tiny_weights, in_iteration, monkeypatch):
    monkeypatch.setattr(finetune, "evaluate", lambda *args: (1.0, 1.0, []))
    monkeypatch.setattr(finetune, "show_test", lambda *args: torch.zeros(4, 4, 3, dtype=torch.uint8).numpy())

    def spoil(parameters, limit):
        parameters[0].data.fill_(float("nan"))
        return torch.tensor(1.0)

    in_iteration(3, lambda: monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil))
    assert run_tiny(config, tiny_weights, *FLAGS) == 0
    assert not Path("exp/run/checkpoints/best.pth").exists()


# --- faults in the data during the run ---


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes_ends_the_run_with_its_state(
    config, tiny_weights, data, uninterrupted, in_iteration, capsys, workers
):
    options = (*FLAGS, "--cache_mb", 0, "--num_workers", workers)
    background = next((data / "backgrounds").iterdir())
    content = background.read_bytes()
    in_iteration(8, background.unlink)
    assert run_tiny(config, tiny_weights, *options) == 1
    error = capsys.readouterr().err
    assert f"{background.name}: cannot be decoded" in error and "Traceback" not in error
    background.write_bytes(content)
    assert run_tiny(config, tiny_weights, *options, "--resume") == 0
    assert int(re.search(r"after iteration (\d+)", capsys.readouterr().out)[1]) >= 8
    assert_same_results(results(), uninterrupted)


def test_a_file_that_is_back_at_once_is_read_again(data, config, monkeypatch):
    config = finetune.load_config(config)
    sources = dataset.find_sources(list(config.dataset.train))
    train_set = dataset.TrainSet(sources, frame=dataset.Frame(64, 32), prompt="none", seed=0)
    use = train_set.epoch(0)[0]
    expected, read_image, calls = train_set[use], dataset.read_image, []

    def fail_once(path):
        calls.append(path)
        if len(calls) == 1:
            raise ValueError("hiccup")
        return read_image(path)

    monkeypatch.setattr(dataset, "read_image", fail_once)
    assert torch.equal(train_set[use]["image"], expected["image"])


def test_a_data_worker_that_dies_is_reported(config, tiny_weights, in_iteration, uninterrupted, capsys):
    def kill_worker():
        process = multiprocessing.active_children()[0]
        os.kill(process.pid, signal.SIGKILL)
        process.join()

    in_iteration(8, kill_worker)
    assert run_tiny(config, tiny_weights, *FLAGS, "--num_workers", 1) == 1
    error = capsys.readouterr().err
    assert "a process that prepares data has died" in error and "Traceback" not in error
    assert run_tiny(config, tiny_weights, *FLAGS, "--num_workers", 1, "--resume") == 0
    assert_same_results(results(), uninterrupted)
