"""Logs of a run: silence when disabled, resumed metrics, failing writes."""

import errno
import json
import re
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import scalars

import run_logger
from base.errors import UserError
from imaging.metrics import GroundTruth, aggregate, compute_stats
from run_logger import RunLogger, ShownImage

SCALARS = {"loss": 1.0, "lr": 1e-3, "images_per_s": 2.0, "data_wait": 0.5}


def log_everything(logger):
    """Call every method of a logger with the results of one test image."""
    mask = np.zeros((20, 30), bool)
    mask[8:12] = True
    stats = [compute_stats(np.where(mask, 1.0, -1.0).astype(np.float32), GroundTruth.from_mask(mask))]
    image = np.zeros((20, 60, 3), np.uint8)
    shown = ShownImage("a.png", 0.5, "worst", image)
    metrics = aggregate(stats)
    logger.settings({"lr": 1e-3}, {"dataset": {}}, 0)
    logger.print("text")
    logger.training(SCALARS, 1)
    logger.test(metrics, stats, [shown], [shown, replace(shown, role="best")], 1)
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
    assert names == {"args.yaml", "config.yaml", "metrics.jsonl", "last_test.json", "events.out"}
    assert "text" in capsys.readouterr().out


def test_a_resumed_logger_drops_later_lines_and_a_partial_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": iteration, "iou": 0.5}) for iteration in (0, 10, 20)]
    path.write_text("\n".join(lines) + '\n{"iteration": 3')
    RunLogger(tmp_path, iterations=30, done=10, resumed=True, enabled=True).close()
    assert path.read_text().splitlines() == lines[:2]
    path.write_bytes(b"\xff\n{}\n[1]\n" + lines[1].encode() + b'\n{"iteration": "x"}\n')  # damaged
    RunLogger(tmp_path, iterations=30, done=10, resumed=True, enabled=True).close()
    assert path.read_text().splitlines() == lines[1:2]
    path.write_text(lines[0] + "\n" + lines[1][:-4])  # cut off in the last line that counts
    RunLogger(tmp_path, iterations=30, done=10, resumed=True, enabled=True).close()
    assert path.read_text() == lines[0] + "\n"
    path.unlink()
    path.mkdir()  # it cannot be read
    with pytest.raises(UserError, match=re.escape(f"writing to {tmp_path} failed: ") + ".*metrics.jsonl"):
        RunLogger(tmp_path, iterations=30, done=10, resumed=True, enabled=True)


def test_a_log_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    for name in ("metrics.jsonl", "events.out.tfevents.1"):
        (tmp_path / name).touch()

    def refuse(path, missing_ok=False):  # as Windows does for an open file
        raise PermissionError(errno.EACCES, "in use", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=r"events\.out\.tfevents\.1.* \(in use\): .*TensorBoard.*--exp_name"):
        run_logger.remove_logs(tmp_path)
    monkeypatch.undo()
    run_logger.remove_logs(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(UserError, match=re.escape(f"writing to {tmp_path / 'run'} failed")):
        RunLogger(tmp_path / "run", iterations=2, done=0, resumed=False, enabled=True)


def curve(folder):
    return scalars(folder).get("train/loss", [])


def train_to(logger, first, last):
    for iteration in range(first, last + 1):
        logger.training(SCALARS | {"loss": float(iteration)}, iteration)


def test_curves_go_on_in_a_new_file_if_theirs_is_deleted(tmp_path, capsys):
    logger = RunLogger(tmp_path, iterations=9, done=0, resumed=False, enabled=True)
    log_everything(logger)
    (first,) = tmp_path.glob("events.out.tfevents.*")
    first.unlink()
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match=f"{first.name} was deleted; the curves go on in events"):
        train_to(logger, 3, 4)
    with pytest.warns(UserWarning, match="jsonl was deleted"):
        log_everything(logger)
    (second,) = tmp_path.glob("events.out.tfevents.*")
    assert second.name > first.name
    assert curve(tmp_path) == [(1, 1.0), (3, 3.0), (4, 4.0)]


def test_a_resumed_logger_replaces_later_events(tmp_path):
    logger = RunLogger(tmp_path, iterations=9, done=0, resumed=False, enabled=True)
    train_to(logger, 1, 6)
    logger = RunLogger(tmp_path, iterations=9, done=3, resumed=True, enabled=True)
    train_to(logger, 4, 5)
    assert curve(tmp_path) == [(n, float(n)) for n in range(1, 6)]


@pytest.fixture
def full_disk():
    """`full_disk(True)` lets no file grow above 2000 bytes, `full_disk(False)` lets them."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if full else limits[0], limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_gives_one_error_and_no_half_event(tmp_path, full_disk, capfd):
    logger = RunLogger(tmp_path, iterations=99, done=0, resumed=False, enabled=True)
    full_disk(True)
    with pytest.raises(UserError, match=re.escape(f"writing to {tmp_path} failed: ") + ".*File too large"):
        train_to(logger, 1, 99)
    before = curve(tmp_path)
    assert 2 < len(before) < 30 and before == [(n, float(n)) for n in range(1, len(before) + 1)]
    assert "Traceback" not in capfd.readouterr().err
    full_disk(False)
    logger.flush()  # what was left
    train_to(logger, len(before) + 2, 40)
    assert curve(tmp_path) == [(n, float(n)) for n in range(1, 41)]
