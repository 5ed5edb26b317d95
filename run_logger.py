"""The logs of a run: TensorBoard, metrics.jsonl, progress bar. Silent in every process but the first."""

import base64
import io
import json
import math
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary
from tqdm import tqdm

from base.atomic import write_text
from base.errors import UserError
from imaging.media import encode_image
from imaging.metrics import ImageStats, iou_by_threshold, robust_threshold
from imaging.visualize import caption, sheet
from train_config import ARGS_FILE, CONFIG_FILE

METRICS_FILE = "metrics.jsonl"
LAST_TEST_FILE = "last_test.json"  # what the report shows of the last test
# TensorBoard's table of runs (HPARAMS) shows these metrics of the best test, and all flags but these.
BEST_METRICS = ("iou", "dice", "cldice")
NOT_IN_HPARAMS = {
    "exp_name", "checkpoint", "device", "num_workers", "cache_mb", "max_pixels", "max_bad_steps",
    "save_interval", "keep_last", "resume_interval", "test_interval", "log_interval",
}  # fmt: skip
# TensorBoard's page CUSTOM SCALARS: what matters first.
FIRST_CURVES = {
    "result": {
        "test IoU": ["Multiline", ["^test/iou$"]],
        "test clDice": ["Multiline", ["^test/cldice$"]],
        "training loss": ["Multiline", ["^train/loss$"]],
    }
}


@dataclass(frozen=True)
class ShownImage:
    """A test image as it is shown.

    name: that of its file.
    role: "worst", "median" or "best" of its test; empty for others.
    panel: RGB uint8 (H, 2 W, 3), see `imaging.visualize.panel`.
    """

    name: str
    iou: float
    role: str
    panel: np.ndarray

    def captioned(self) -> np.ndarray:
        """The panel below its IoU, role and name."""
        return caption(self.panel, " ".join([f"IoU {self.iou:.3f}", self.role, self.name]))


class EventFile:
    """A file of TensorBoard events in a folder.

    PyTorch's `SummaryWriter` writes in a thread, whose errors show as tracebacks. Here, `flush` writes and
    raises OSError. If the file was deleted, `flush` gives a warning and continues in a new one.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        """Open a new file. TensorBoard ignores earlier events from `purge_step` on."""
        self._folder, self._pending = folder, io.BytesIO()
        self.path = self._new_path()
        self.path.touch(exist_ok=False)
        self._add(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def add(self, content: Any, step: int = 0) -> None:
        """Add what a function of `torch.utils.tensorboard.summary` returned."""
        self._add(Event(summary=content, step=step))

    def flush(self) -> None:
        """Append all events to the file. If this fails, the file stays as it was, and they are kept."""
        if not self.path.exists():
            deleted, self.path = self.path, self._new_path()
            warnings.warn(f"{deleted} was deleted; the curves go on in {self.path.name}", stacklevel=2)
            events = self._pending.getvalue()
            self._pending = io.BytesIO()
            self._add(Event(file_version="brain.Event:2"))
            self._pending.write(events)
        with self.path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            rest = self._pending.getvalue()
            try:
                while rest:
                    rest = rest[file.write(rest) :]  # a disk that fills up may take a part
            except OSError:
                file.truncate(size)
                raise
        self._pending = io.BytesIO()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        RecordWriter(self._pending).write(event.SerializeToString())

    def _new_path(self) -> Path:
        # TensorBoard reads files in the order of their names, which begins with the time.
        return self._folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"


class RunLogger:
    """Logs of one run in `folder`. With `enabled` false every method does nothing.

    Every write that fails raises UserError, which names the folder.

    Args:
        folder: exp/NAME.
        iterations: how many the whole run has; None if that is not known yet.
        done: how many of them are done.
        resumed: whether earlier logs are there; what they hold after iteration `done` is dropped.
    """

    def __init__(
        self, folder: Path, *, iterations: int | None, done: int, resumed: bool, enabled: bool
    ) -> None:
        self.folder, self.enabled, self._has_metrics = folder, enabled, False
        self.bar = tqdm(total=iterations, initial=done, unit="it", dynamic_ncols=True, disable=not enabled)
        if enabled:
            with self._writing():
                self.events = EventFile(folder, purge_step=done + 1 if resumed else None)
                if resumed:
                    _drop_later_lines(folder / METRICS_FILE, done)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
            self.events.flush()
        except OSError as error:  # TensorBoard's names no file
            raise UserError(f"writing to {self.folder} failed: {error}") from error

    def print(self, text: str) -> None:
        if self.enabled:
            tqdm.write(text)

    def settings(self, flags: dict[str, Any], config: dict[str, Any], iteration: int) -> None:
        """Write `args.yaml` and `config.yaml`; show the flags as text and as this run's row in HPARAMS."""
        if not self.enabled:
            return
        for name, values in ((CONFIG_FILE, config), (ARGS_FILE, flags)):
            text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
            write_text(self.folder / name, text)
        with self._writing():
            text = yaml.safe_dump(flags, sort_keys=False)
            self.events.add(summary.text("flags", f"```\n{text}```"), iteration)
            names = dict.fromkeys(["train", "model_type", *flags])  # the columns, in this order
            shown = {name: flags[name] for name in names if name in flags.keys() - NOT_IN_HPARAMS}
            best = {f"best/{name}": 0.0 for name in BEST_METRICS}
            self.events.add(summary.custom_scalars(FIRST_CURVES))
            for part in summary.hparams(shown, best)[:2]:  # the third would say that the run has ended
                self.events.add(part)

    def training(self, scalars: dict[str, float], iteration: int) -> None:
        """Write scalars under `train/`, and show the main ones beside the progress bar."""
        if not self.enabled:
            return
        with self._writing():
            for name, value in scalars.items():
                self._scalar(f"train/{name}", value, iteration)
        self.bar.set_postfix_str(
            f"loss {scalars['loss']:.3f}, lr {scalars['lr']:.1e}, "
            f"{scalars['images_per_s']:.2f} images/s, {scalars['data_wait']:.0%} data wait"
        )

    def test(
        self,
        metrics: dict[str, float],
        stats: list[ImageStats],
        first: list[ShownImage],
        ranked: list[ShownImage],
        iteration: int,
    ) -> None:
        """Write the metrics of a test, the stats of its images, its first images, and some sorted by IoU."""
        if not self.enabled:
            return
        with self._writing():
            for name, value in metrics.items():
                self._scalar(f"test/{name}", value, iteration)
            self._precision_recall(stats, iteration)
            medians = [image for image in ranked if image.role == "median"]
            worst_and_median = [ranked[0], *medians[-1:]]
            for tag, images in (("test/panel", first), ("test/worst_and_median", worst_and_median)):
                self._image(tag, sheet([image.captioned() for image in images]), iteration)
            self._metrics({"iteration": iteration} | metrics)
        write_text(self.folder / LAST_TEST_FILE, json.dumps(_last_test(stats, ranked, iteration)))
        self.print(f"iteration {iteration}: test IoU {metrics['iou']:.4f}, Dice {metrics['dice']:.4f}")

    def _metrics(self, line: dict[str, float]) -> None:
        path = self.folder / METRICS_FILE
        if self._has_metrics and not path.exists():
            warnings.warn(f"{path} was deleted; it goes on without the earlier tests", stacklevel=2)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._has_metrics = True

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
        curve = summary.pr_curve_raw("test/pixels", *counts, precision, recall, len(true_positives))
        self.events.add(curve, iteration)

    def best(self, metrics: dict[str, float], iteration: int) -> None:
        """Write the metrics of a new best test."""
        if self.enabled:
            with self._writing():
                for name in BEST_METRICS:
                    self._scalar(f"best/{name}", metrics[name], iteration)

    def training_panels(self, panels: list[np.ndarray], iteration: int) -> None:
        """Show samples of a training batch."""
        if self.enabled:
            with self._writing():
                self._image("train/panel", sheet(panels), iteration)

    def _image(self, tag: str, image: np.ndarray, iteration: int) -> None:
        self.events.add(summary.image(tag, image, dataformats="HWC"), iteration)

    def _scalar(self, tag: str, value: float, iteration: int) -> None:
        self.events.add(summary.scalar(tag, value), iteration)

    def flush(self) -> None:
        """Write again what could not be written."""
        if self.enabled:
            with self._writing():
                pass

    def close(self) -> None:
        self.bar.close()
        self.flush()


def _last_test(stats: list[ImageStats], ranked: list[ShownImage], iteration: int) -> dict[str, Any]:
    """What LAST_TEST_FILE holds. `images` are JPEG files in base 64: the image and what was found in it."""
    return {
        "iteration": iteration,
        "count": len(stats),
        "threshold": robust_threshold(stats),
        "iou_by_threshold": iou_by_threshold(stats).tolist(),
        "images": [
            {
                "name": printable(shown.name),
                "iou": shown.iou,
                "role": shown.role,
                "images": [
                    base64.b64encode(encode_image(half, ".jpg")).decode()
                    for half in np.split(shown.panel, 2, axis=1)
                ],
            }
            for shown in ranked
        ],
    }


def printable(text: str) -> str:
    """The text without what UTF-8 cannot hold, which file names on Linux may contain."""
    return text.encode(errors="replace").decode()


def remove_logs(folder: Path) -> None:
    """Remove the logs in the folder of a run. Raises UserError if another program keeps one of them."""
    for path in [*folder.glob("events.out.tfevents.*"), folder / METRICS_FILE, folder / LAST_TEST_FILE]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{path}, a log of the run that died, cannot be removed ({error.strerror}): end the programs "
                "that have it open, such as TensorBoard, or choose another --exp_name"
            ) from error


def _drop_later_lines(path: Path, iteration: int) -> None:
    """Keep the metrics up to an iteration. What came later is measured again; a damaged line is dropped."""
    if path.exists():
        lines = path.read_text(errors="replace").splitlines()
        kept = [line for line in lines if _iteration(line) <= iteration]
        write_text(path, "".join(f"{line}\n" for line in kept))


def _iteration(line: str) -> float:
    """The iteration of a line of metrics; infinity for a damaged line."""
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, TypeError, KeyError):
        return math.inf
