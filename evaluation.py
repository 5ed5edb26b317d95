"""What a run measures: the test and the width of the cables. Also the panels that TensorBoard shows."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

import runtime
from dataset import SHOWN_SIDE, TrainSet
from embeddings import EncodedTestSample, TrainBatch
from imaging.geometry import pad_to_square
from imaging.metrics import ImageStats, aggregate, compute_stats, robust_threshold
from imaging.visualize import draw_points, panel, shrink
from inference import LoadedSam, decode_logits
from run_logger import RunLogger, ShownImage
from sam.decoder import upscale
from sidecar import median_cable_width

PANELS = 4  # how many images of the test set and of a training batch are shown


def evaluate(
    net: LoadedSam, tests: list[EncodedTestSample], batch_size: int
) -> Iterator[tuple[EncodedTestSample, np.ndarray]]:
    """Every test sample with its logits, float32 (H, W), at the resolution of the image."""
    for first in range(0, len(tests), batch_size):
        batch = tests[first : first + batch_size]
        kept = [test.embedding for test in batch if test.embedding is not None]
        embeddings = torch.cat(kept) if kept else _encode(net, batch)
        logits = decode_logits(
            net,
            embeddings,
            torch.cat([test.points for test in batch]),
            torch.cat([test.labels for test in batch]),
            sizes=[test.size for test in batch],
            original_sizes=[test.ground_truth.shape for test in batch],
            prompts_per_image=[1] * len(batch),
        )
        yield from zip(batch, logits, strict=True)


def _encode(net: LoadedSam, batch: list[EncodedTestSample]) -> Tensor:
    """Embeddings (B, C, e, e) of test samples that keep their images."""
    images = [
        torch.from_numpy(pad_to_square(test.image.numpy(), net.spec.img_size))
        for test in batch
        if test.image is not None
    ]
    with torch.no_grad():
        return net.encode(torch.stack(images), torch.tensor([test.size for test in batch]))


@dataclass(frozen=True)
class TestResult:
    """What is kept of the prediction for a test image.

    shown: bool, the predicted mask, at most SHOWN_SIDE pixels a side.
    """

    __test__ = False  # not a pytest class

    stats: ImageStats
    shown: np.ndarray


def measure(
    net: LoadedSam,
    tests: list[EncodedTestSample],
    *,
    batch_size: int,
    num_threads: int,
    stop: runtime.StopRequest,
) -> Iterator[TestResult]:
    """The results of the test samples, in order.

    Threads measure while this one decodes the next images. They run in parallel, because OpenCV, NumPy and
    scikit-image release Python's lock. At most `num_threads` images are measured or wait for it, which bounds
    the memory for logits and the time until a signal is obeyed.

    Raises Stopped after the current images if a signal ends the run.
    """
    pending: deque[Future[TestResult]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for test, logits in evaluate(net, tests, batch_size):
            if len(pending) == num_threads:
                yield pending.popleft().result()
            stop.check()
            pending.append(pool.submit(_measure, test, logits))
        for future in pending:
            stop.check()
            yield future.result()


def _measure(test: EncodedTestSample, logits: np.ndarray) -> TestResult:
    return TestResult(compute_stats(logits, test.ground_truth), shrink(logits > 0, SHOWN_SIDE))


def run_test(
    net: LoadedSam,
    tests: list[EncodedTestSample],
    *,
    batch_size: int,
    num_threads: int,
    iteration: int,
    logger: RunLogger,
    stop: runtime.StopRequest,
) -> dict[str, float]:
    """Measure the model on the test set and log it; returns the metrics, iteration and `robust_threshold`.

    `tests` is the share of this process: of N processes, process r has the samples r, r + N, r + 2 N, ...
    Raises Stopped after the current images if a signal ends the run.
    """
    rank, n_processes = runtime.rank(), runtime.world_size()
    results = list(measure(net, tests, batch_size=batch_size, num_threads=num_threads, stop=stop))
    gathered = runtime.gather([(rank + n_processes * n, result.stats) for n, result in enumerate(results)])
    stats = [image_stats for _, image_stats in sorted(gathered, key=itemgetter(0))]
    metrics = aggregate(stats)
    by_iou = np.argsort([image.scores.iou for image in stats], kind="stable").tolist()
    roles = {by_iou[place]: role for place, role in choose_places(len(stats)).items()}
    first = range(len(stats))[:PANELS]
    drawn = []  # by this process
    for number in {*first, *roles}:
        n, owner = divmod(number, n_processes)
        if owner == rank:
            drawn.append((number, tests[n].name, test_panel(tests[n], results[n].shown)))
    shown = {
        number: ShownImage(name, stats[number].scores.iou, roles.get(number, ""), image)
        for number, name, image in runtime.gather(drawn)
    }
    ranked = [shown[number] for number in by_iou if number in roles]
    logger.test(metrics, stats, [shown[number] for number in first], ranked, iteration)
    return {"iteration": iteration, "threshold": robust_threshold(stats)} | metrics


WORST, MEDIAN, BEST = 4, 2, 2  # how many images of a test are kept for the report, if it has many


def choose_places(n: int) -> dict[int, str]:
    """Choose which of n images, sorted by rising IoU, are shown: "worst", "median" or "best" by place.

    The first image and the one at `n // 2` are always among them.
    """
    worst, best = min(WORST, max(1, n // 3)), min(BEST, n // 3)
    median = min(MEDIAN, n - worst - best)
    start = n // 2 - median // 2
    return (
        dict.fromkeys(range(worst), "worst")
        | dict.fromkeys(range(start, start + median), "median")
        | dict.fromkeys(range(n - best, n), "best")
    )


def test_panel(test: EncodedTestSample, prediction: np.ndarray) -> np.ndarray:
    """The thumbnail of a test sample with its prompt, beside the pixels that are found, missed and wrong."""
    longest = max(test.thumbnail.shape)
    scale = longest / max(test.size)
    image = draw_points(test.thumbnail, test.points[0].numpy() * scale, test.labels[0].numpy())
    return panel(image, shrink(test.ground_truth.mask, longest), shrink(prediction, longest))


def train_panels(net: LoadedSam, train_set: TrainSet, batch: TrainBatch, logits: Tensor) -> list[np.ndarray]:
    """The first samples of a training batch, each beside its prediction, at the size of the model's input."""
    panels = []
    for key, predicted in zip(batch["keys"][:PANELS], logits.detach().float().cpu(), strict=False):
        sample = train_set[key]
        height, width = sample["size"].tolist()
        image = sample["image"].numpy()[:height, :width]
        image = draw_points(image, sample["points"].numpy(), sample["labels"].numpy())
        ground_truth, prediction = (
            upscale(net.sam, low_res[None], (height, width), (height, width))[0, 0].numpy() > 0
            for low_res in (sample["target"] / 255 - 0.5, predicted)
        )
        panels.append(panel(image, ground_truth, prediction))
    return panels


WIDTH_SAMPLES = 32  # training samples that the width of cables is measured on
WIDTH_GRID = 512  # side of the grid that it is measured on, but at most 4 cells per pixel of the input


def training_cable_width(train_set: TrainSet) -> float | None:
    """Median width of the cables in the first samples of the training, in pixels of the model's input.

    The samples are made once more, on a finer grid: in an input of 256 px, thin cables are at most one pixel
    wide. None if no cable is seen.
    """
    spec = train_set.spec
    grid = max(spec.mask_grid, min(4 * spec.img_size, WIDTH_GRID))
    fine = TrainSet(
        train_set.datasets, spec=replace(spec, mask_grid=grid), prompt="none", seed=train_set.seed
    )
    targets = (fine[key]["target"][0].numpy() for key in fine.epoch(0)[:WIDTH_SAMPLES])
    width = median_cable_width(target > 127 for target in targets)
    return width and width * spec.img_size / grid
