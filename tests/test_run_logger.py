"""Logs of a run: silence when disabled, resumed metrics, and the time that counts."""

import json
import re

import numpy as np
import pytest

import run_logger
from base.errors import UserError
from imaging.metrics import GroundTruth, aggregate, compute_stats
from run_logger import RunLogger, Throughput, Timer

SCALARS = {"loss": 1.0, "lr": 1e-3, "images_per_s": 2.0, "data_wait": 0.5}


def log_everything(logger):
    """Call every method of a logger with the results of one test image."""
    mask = np.zeros((20, 30), bool)
    mask[8:12] = True
    stats = [compute_stats(np.where(mask, 1.0, -1.0).astype(np.float32), GroundTruth.from_mask(mask))]
    image = np.zeros((20, 30, 3), np.uint8)
    metrics = aggregate(stats)
    logger.settings({"lr": 1e-3}, {"dataset": {}}, 0)
    logger.print("text")
    logger.training(SCALARS, 1)
    logger.test(metrics, stats, [image], [image, image], 1)
    logger.best(metrics, 1)
    logger.training_panels([image], 1)
    logger.bar.update()
    logger.flush()
    logger.close()


def test_a_disabled_logger_writes_and_prints_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    log_everything(RunLogger(folder, iterations=2, done=0, resumed=False, enabled=False))
    assert not folder.exists()
    assert capsys.readouterr() == ("", "")
    folder.mkdir()
    # Of an enabled logger, the same calls do write and print.
    log_everything(RunLogger(folder, iterations=2, done=0, resumed=False, enabled=True))
    names = {path.name.partition(".tfevents")[0] for path in folder.iterdir()}
    assert names == {"args.yaml", "config.yaml", "metrics.jsonl", "events.out"}
    assert "text" in capsys.readouterr().out


def test_a_resumed_logger_drops_later_lines_and_a_partial_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": iteration, "iou": 0.5}) for iteration in (0, 10, 20)]
    path.write_text("\n".join(lines) + '\n{"iteration": 3')
    RunLogger(tmp_path, iterations=30, done=10, resumed=True, enabled=True).close()
    assert path.read_text().splitlines() == lines[:2]
    path.write_text(lines[0] + "\n" + lines[1][:-4])  # cut off in the last line that counts
    RunLogger(tmp_path, iterations=30, done=10, resumed=True, enabled=True).close()
    assert path.read_text() == lines[0] + "\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(UserError, match=re.escape(f"writing to {tmp_path / 'run'} failed")):
        RunLogger(tmp_path / "run", iterations=2, done=0, resumed=False, enabled=True)


# --- time ---


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` lets time pass."""
    now = [100.0]
    monkeypatch.setattr(run_logger.time, "monotonic", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_paused_time_does_not_count(clock):
    timer = Timer()
    clock(2)
    with timer.paused():
        clock(50)
    clock(3)
    assert timer.seconds() == 5
    timer.restart()
    clock(1)
    assert timer.seconds() == 1


def test_throughput_counts_images_and_the_share_of_waiting(clock):
    throughput = Throughput()
    for _ in range(2):
        clock(5)
        throughput.count(4, data_wait=2.0)
    with throughput.paused():
        clock(90)
    assert throughput.rates() == {"images_per_s": 0.8, "data_wait": 0.4}
    throughput.restart()
    clock(2)
    throughput.count(4, data_wait=0.0)
    assert throughput.rates() == {"images_per_s": 2.0, "data_wait": 0.0}
