"""What happens before training: signals, the length of the run, the download of weights."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import run_tiny, tiny_config

import checkpoint
import disk_space
import experiment
import runtime
from imaging import checking


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_check_ends_it_with_a_line(
    config_file, tiny_weights, decoded, monkeypatch, capsys, number
):
    handler, decode = signal.getsignal(number), checking._decode

    def signal_at_the_first(item):
        infos = decode(item)
        if len(decoded) == 1:
            os.kill(os.getpid(), number)
        time.sleep(0.1)
        return infos

    monkeypatch.setattr(checking, "PIXELS_AT_ONCE", 1)  # one item after the other
    monkeypatch.setattr(checking, "_decode", signal_at_the_first)
    assert run_tiny(config_file(), tiny_weights) == 128 + number
    assert capsys.readouterr().err == f"{signal.Signals(number).name}: nothing was trained\n"
    assert len(decoded) <= 2 and not Path("exp").exists()
    assert signal.getsignal(number) is handler


def test_a_run_has_about_eight_tests_by_default_and_keeps_their_interval(
    tiny_weights, config_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = config_file(percentage=1.5)  # 9 samples in batches of 2: 5 iterations an epoch
    assert run_tiny(config, tiny_weights, "-e", 4, "-b", 2) == 0
    lines = [json.loads(line) for line in Path("exp/run/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 3, 6, 9, 12, 15, 18, 20]
    assert yaml.safe_load(Path("exp/run/args.yaml").read_text())["test_interval"] == 3
    for flags, expected in (((), 3), (("--test_interval", 7), 7)):
        resumed = tiny_config(config, tiny_weights, "-n", "run", "--resume", "-e", 8, "-b", 2, *flags)
        assert experiment.prepare(resumed).config.test_interval == expected


def test_the_length_of_a_run_of_minutes_does_not_come_from_the_number_of_epochs(
    tiny_weights, config_file, monkeypatch
):
    needed, images = [], []
    monkeypatch.setattr(disk_space, "require_free_space", lambda folder, size, purpose: needed.append(size))
    monkeypatch.setattr(runtime, "should_compile", lambda choice, device, count: images.append(count))
    photos = config_file(bg_paths=None, w_aug=False)
    for flags in (["-e", 1, "-s", 1], ["-e", 500, "-s", 1], ["--keep_last", 2, "-s", 1]):
        experiment.prepare(tiny_config(photos, tiny_weights, "--minutes", 2, *flags))
    weights = 4 * sum(weight.numel() for weight in checkpoint.load_weights(tiny_weights).values())
    assert needed[0] == needed[1] == needed[2] > 2 * weights  # no checkpoint of an epoch, photos are kept
    assert images == [2 * 60 * experiment.IMAGES_PER_SECOND] * 3


def test_a_run_that_starts_a_moment_later_under_the_same_name_is_refused(
    config_file, tiny_weights, monkeypatch, capsys
):
    load = experiment.load_data_config

    def load_while_another_run_starts(config):
        Path("exp/run/checkpoints").mkdir(parents=True)  # after the check that exp/run is unused
        return load(config)

    monkeypatch.setattr(experiment, "load_data_config", load_while_another_run_starts)
    assert run_tiny(config_file(), tiny_weights) == 2
    error = capsys.readouterr().err
    assert "error: another run has just started in exp/run; choose another --exp_name" in error
    assert "--resume" not in error and not list(Path("exp/run/checkpoints").iterdir())


@pytest.mark.parametrize(
    ("local_rank", "expected"), [("0", ["download", "wait"]), ("1", ["wait", "download"])]
)
def test_the_first_process_of_a_machine_downloads_the_weights(
    config_file, tmp_path, monkeypatch, local_rank, expected
):
    calls = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(experiment, "pretrained_path", lambda model_type: calls.append("download"))
    monkeypatch.setattr(runtime, "barrier", lambda: calls.append("wait"))
    experiment.find_weights(replace(tiny_config(config_file(), tmp_path / "none.pth"), checkpoint=None))
    assert calls == expected
