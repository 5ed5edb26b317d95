"""What a run shows and logs: TensorBoard, metrics.jsonl, console. Silent in every process but the first."""

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from base.atomic import write_text
from base.errors import UserError
from dataset_index import DatasetIndex
from imaging.metrics import ImageStats
from imaging.visualize import sheet

METRICS_FILE = "metrics.jsonl"
# TensorBoard's table of runs (HPARAMS) shows these metrics of the best test, and all flags but these.
BEST_METRICS = ("iou", "dice", "cldice")
NOT_IN_HPARAMS = {
    "exp_name", "checkpoint", "device", "num_workers", "cache_mb", "max_pixels", "max_bad_steps",
    "save_interval", "keep_last", "resume_interval", "test_interval", "log_interval",
}  # fmt: skip


class RunLogger:
    """Logs of one run in `folder`. With `enabled` false every method does nothing.

    Every write that fails raises UserError, which names the folder.

    Args:
        folder: exp/NAME.
        iterations: how many the whole run has.
        done: how many of them are done.
        resumed: whether earlier logs are there; what they hold after iteration `done` is dropped.
    """

    def __init__(self, folder: Path, *, iterations: int, done: int, resumed: bool, enabled: bool) -> None:
        self.folder, self.enabled = folder, enabled
        self.bar = tqdm(total=iterations, initial=done, unit="it", dynamic_ncols=True, disable=not enabled)
        if enabled:
            with self._writing():
                self.writer = SummaryWriter(folder, purge_step=done + 1 if resumed else None)
                if resumed:
                    _drop_later_lines(folder / METRICS_FILE, done)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # TensorBoard's names no file
            raise UserError(f"writing to {self.folder} failed: {error}") from error

    def print(self, text: str) -> None:
        if self.enabled:
            tqdm.write(text)

    def settings(self, flags: dict[str, Any], config: dict[str, Any], iteration: int) -> None:
        """Write `args.yaml` and `config.yaml`; show the flags as text and as this run's row in HPARAMS."""
        if not self.enabled:
            return
        for name, values in (("config.yaml", config), ("args.yaml", flags)):
            text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
            write_text(self.folder / name, text)
        with self._writing():
            text = yaml.safe_dump(flags, sort_keys=False)
            self.writer.add_text("flags", f"```\n{text}```", iteration)
            shown = {name: value for name, value in flags.items() if name not in NOT_IN_HPARAMS}
            best = {f"best/{name}": 0.0 for name in BEST_METRICS}
            for summary in hparams(shown, best)[:2]:  # the third would say that the run has ended
                self.writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]

    def training(self, scalars: dict[str, float], iteration: int) -> None:
        """Write scalars under `train/`, and show the main ones beside the progress bar."""
        if not self.enabled:
            return
        with self._writing():
            for name, value in scalars.items():
                self.writer.add_scalar(f"train/{name}", value, iteration)
        self.bar.set_postfix_str(
            f"loss {scalars['loss']:.3f}, lr {scalars['lr']:.1e}, "
            f"{scalars['images_per_s']:.2f} images/s, {scalars['data_wait']:.0%} data wait"
        )

    def test(
        self,
        metrics: dict[str, float],
        stats: list[ImageStats],
        panels: list[np.ndarray],
        worst_and_median: list[np.ndarray],
        iteration: int,
    ) -> None:
        """Write the metrics of a test, the stats of all its images, and panels (RGB images) of some."""
        if not self.enabled:
            return
        with self._writing():
            for name, value in metrics.items():
                self.writer.add_scalar(f"test/{name}", value, iteration)
            self._precision_recall(stats, iteration)
            self._image("test/panel", sheet(panels), iteration)
            self._image("test/worst_and_median", sheet(worst_and_median), iteration)
            with (self.folder / METRICS_FILE).open("a") as file:
                file.write(json.dumps({"iteration": iteration} | metrics) + "\n")
        self.print(f"iteration {iteration}: test IoU {metrics['iou']:.4f}, Dice {metrics['dice']:.4f}")

    def _precision_recall(self, stats: list[ImageStats], iteration: int) -> None:
        """Precision and recall of all pixels together, at the thresholds of `imaging.metrics`."""
        false_positives, true_positives = np.sum([s.counts for s in stats], axis=0)
        background, foreground = np.sum([s.pixel_counts for s in stats], axis=0)
        precision = true_positives / np.maximum(true_positives + false_positives, 1)
        recall = true_positives / max(foreground, 1)
        counts = (
            true_positives,
            false_positives,
            background - false_positives,
            foreground - true_positives,
        )
        self.writer.add_pr_curve_raw(
            "test/pixels", *counts, precision, recall, iteration, num_thresholds=len(true_positives)
        )

    def best(self, metrics: dict[str, float], iteration: int) -> None:
        """Write the metrics of a new best test."""
        if self.enabled:
            with self._writing():
                for name in BEST_METRICS:
                    self.writer.add_scalar(f"best/{name}", metrics[name], iteration)

    def training_panels(self, panels: list[np.ndarray], iteration: int) -> None:
        """Show samples of a training batch."""
        if self.enabled:
            with self._writing():
                self._image("train/panel", sheet(panels), iteration)

    def _image(self, tag: str, image: np.ndarray, iteration: int) -> None:
        self.writer.add_image(tag, image, iteration, dataformats="HWC")

    def flush(self) -> None:
        if self.enabled:
            with self._writing():
                self.writer.flush()

    def close(self) -> None:
        self.bar.close()
        if self.enabled:
            with self._writing():
                self.writer.close()


def remove_logs(folder: Path) -> None:
    """Remove the logs in the folder of a run."""
    for path in [*folder.glob("events.out.tfevents.*"), folder / METRICS_FILE]:
        path.unlink(missing_ok=True)


def _drop_later_lines(path: Path, iteration: int) -> None:
    """Keep the metrics up to an iteration. What came later is measured again; a partial line is dropped."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["iteration"] <= iteration]
        write_text(path, "".join(f"{line}\n" for line in kept))


# --- Time -------------------------------------------------------------------------------------


class Timer:
    """Seconds since the last `restart`, without the time inside `paused`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start, self._paused = time.monotonic(), 0.0

    def seconds(self) -> float:
        return time.monotonic() - self._start - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start


class Throughput:
    """Images per second and the share of time spent waiting for data, since the last `restart`."""

    def __init__(self) -> None:
        self._timer = Timer()
        self.restart()

    def restart(self) -> None:
        self._timer.restart()
        self._images, self._data_wait = 0, 0.0

    def count(self, images: int, data_wait: float) -> None:
        """Count the images of one iteration, and the seconds that it waited for data."""
        self._images += images
        self._data_wait += data_wait

    def rates(self) -> dict[str, float]:
        seconds = self._timer.seconds()
        return {"images_per_s": self._images / seconds, "data_wait": self._data_wait / seconds}

    def paused(self) -> AbstractContextManager[None]:
        """A context whose time does not count."""
        return self._timer.paused()


# --- Summaries --------------------------------------------------------------------------------


def dataset_table(train: list[DatasetIndex], test: DatasetIndex | None) -> str:
    """One line for each dataset: pairs, foreground of the masks, backgrounds, augmentation, percentage.

    Below it, one line for what is not read, or is read as cable in several colors.
    """
    columns = f"{'pairs':>6} {'foreground':>11} {'backgrounds':>12} {'augmented':>10} {'percentage':>11}"
    lines = [f"{'dataset':40} {columns}"]
    for dataset in [*train, *([test] if test else [])]:
        config = dataset.config
        name = f"{'test' if dataset is test else 'train'} {_shorten(str(config.data_dir), 34)}"
        lines.append(
            f"{name:40} {len(dataset.pairs):6} {dataset.foreground:11.2%} {len(dataset.backgrounds):12} "
            f"{config.w_aug!s:>10} {config.percentage:11g}"
        )
        lines += [f"  {note}" for note in dataset.notes()]
    return "\n".join(lines)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else "..." + text[3 - length :]


def result_summary(
    baseline: dict[str, float] | None, best: dict[str, float] | None, checkpoints: Path
) -> str:
    """The closing lines of a run: baseline against best, and where the files are."""
    lines = []
    if baseline and best:
        lines += [
            f"baseline -> fine-tuned: IoU {baseline['iou']:.4f} -> {best['iou']:.4f}, "
            f"Dice {baseline['dice']:.4f} -> {best['dice']:.4f} (best at iteration {best['iteration']})",
            f"best weights     {checkpoints / 'best.pth'}",
        ]
    if (checkpoints / "last.pth").exists():
        lines.append(f"last weights     {checkpoints / 'last.pth'}")
    return "\n".join([*lines, f"curves           tensorboard --logdir {checkpoints.parent}"])
