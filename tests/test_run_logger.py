"""Logs of a run: silence when disabled, resumed metrics, and the time that counts."""

import errno
import json
import re
import resource
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import scalars

import predict
import run_logger
from base.errors import UserError
from imaging.metrics import GroundTruth, aggregate, compute_stats
from run_logger import Budget, RunLogger, ShownImage, Throughput, Timer, result_summary, tool_command
from train_state import Schedule

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


# --- summaries ---


def test_predictions_that_stay_empty_are_said_with_the_way_out(tmp_path):
    for iou, is_said in ((0.0, True), (0.00004, True), (0.001, False)):
        metrics = {"iou": iou, "dice": iou, "iteration": 9}
        text = result_summary(metrics, metrics, tmp_path, tmp_path)
        assert ("warning: the predictions are empty" in text) is is_said
        assert is_said == all(flag in text for flag in ("--epoch_num", "--train encoder", "--preview"))


def test_the_summary_ends_with_a_command_that_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "it's data" / "imgs"
    (tmp_path / "exp/my run/checkpoints").mkdir(parents=True)
    folder = Path("exp/my run")
    assert "next" not in result_summary(None, None, folder, images)
    for name in ("last.pth", "best.pth"):
        (folder / "checkpoints" / name).touch()
        last_line = result_summary(None, None, folder, images).splitlines()[-1]
        python, script, *argv = shlex.split(last_line.removeprefix("next "))
        assert shutil.which(python) == sys.executable and Path(script).samefile(predict.__file__)
        args = predict.parse_args(argv)
        assert (args.checkpoint, args.input) == (folder / "checkpoints" / name, Path("it's data/imgs"))
        assert args.output == Path("predictions/my run")


def test_commands_name_paths_as_seen_from_the_current_directory(monkeypatch):
    monkeypatch.chdir(Path(predict.__file__).parent)
    monkeypatch.setattr(sys, "executable", str(Path(".venv/bin/python").absolute()))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/python")
    assert tool_command("export.py", "a b") == ".venv/bin/python export.py 'a b'"
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable)
    assert tool_command("export.py", Path("a")) == "python export.py a"


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


def epochs_of(budget, clock, seconds, pause=0.0):
    """(iteration, epochs) once `budget` knows them, for iterations of so many seconds: 5 make an epoch."""
    schedule = Schedule(epoch_length=10, batch_size=2, virtual_batch_size=1, epochs=99)
    for iteration in range(1, 99):
        clock(seconds(iteration))
        epochs = budget.epochs(iteration, iteration, schedule, test_interval=4)
        with budget.paused():
            clock(pause)
        if epochs:
            return iteration, epochs
    return None


def test_epochs_follow_from_the_speed_of_the_first_iterations(clock):
    assert epochs_of(Budget(None, 0), clock, lambda iteration: 1) is None
    # 60 s: 3 iterations take 6 s and are not timed, 10 take 10 s, and 44 s are left
    assert epochs_of(Budget(1, 0), clock, lambda iteration: 1 if iteration > 3 else 2) == (13, (13 + 44) // 5)
    # with tests: 47 s are left after the 13th iteration, and 4 s of a test are 1 s an iteration
    budget = Budget(1, 0)
    budget.test_seconds = 4.0
    assert epochs_of(budget, clock, lambda iteration: 1) == (13, (13 + 47 // 2) // 5)
    # pauses count as time of the run, but not of an iteration: 60 - 13 - 12 = 35 s are left
    assert epochs_of(Budget(1, 0), clock, lambda iteration: 1, pause=1.0) == (13, (13 + 35) // 5)
    # long runs measure for a twentieth of their time
    assert epochs_of(Budget(10, 0), clock, lambda iteration: 1) == (30, 600 // 5)


def test_a_budget_does_not_count_on_the_speed_of_iterations_that_encode_for_later_ones(clock):
    # the first epoch takes 2 s an iteration, later ones 0.5 s; timing starts after it
    found = epochs_of(Budget(1, 5), clock, lambda iteration: 2 if iteration <= 5 else 0.5)
    assert found == (15, (15 + 45 * 2) // 5)
    # if the first epoch takes too long, what is known after half the time counts
    assert epochs_of(Budget(1, 50), clock, lambda iteration: 4) == (8, (8 + 28 // 4) // 5)
    assert epochs_of(Budget(0.1, 50), clock, lambda iteration: 9) == (1, 1)  # at least the current epoch


@pytest.mark.parametrize(
    ("scores", "warned"),
    [
        ({"iou": 0.08, "dice": 0.15, "precision": 0.08, "recall": 1.0}, True),
        ({"iou": 0.5, "dice": 0.7, "precision": 0.5, "recall": 0.98}, False),
    ],
)
def test_masks_of_the_whole_image_are_warned_of(tmp_path, scores, warned):
    best = scores | {"iteration": 4}
    text = run_logger.result_summary({"iou": 0.0, "dice": 0.0}, best, tmp_path, Path("photos"))
    assert ("cover nearly the whole image" in text) == warned
