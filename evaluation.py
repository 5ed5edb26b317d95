"""What a run measures: the test, the width of the cables; and the panels that TensorBoard shows."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import runtime
from dataset import TrainSet
from embeddings import EncodedTestSample, TrainBatch
from imaging.metrics import ImageStats, aggregate, compute_stats, robust_threshold
from imaging.visualize import draw_points, panel, shrink
from inference import LoadedSam, decode_logits
from run_logger import PANELS, RunLogger
from sam.decoder import upscale
from sidecar import median_cable_width


def evaluate(
    net: LoadedSam, tests: list[EncodedTestSample], batch_size: int
) -> Iterator[tuple[EncodedTestSample, np.ndarray]]:
    """Every test sample with its logits, float32 (H, W), at the resolution of the image."""
    for first in range(0, len(tests), batch_size):
        batch = tests[first : first + batch_size]
        kept = [test.embedding for test in batch if test.embedding is not None]
        if kept:
            embeddings = torch.cat(kept)
        else:
            images = torch.cat([test.image for test in batch if test.image is not None])
            with torch.no_grad():
                embeddings = net.encode(images, torch.tensor([test.size for test in batch]))
        logits = decode_logits(
            net,
            embeddings,
            torch.cat([test.points for test in batch]),
            torch.cat([test.labels for test in batch]),
            sizes=[test.size for test in batch],
            original_sizes=[test.ground_truth.mask.shape for test in batch],
            prompts_per_image=[1] * len(batch),
        )
        yield from zip(batch, logits, strict=True)


def run_test(
    net: LoadedSam,
    tests: list[EncodedTestSample],
    batch_size: int,
    iteration: int,
    logger: RunLogger,
    stop: runtime.StopRequest,
) -> dict[str, float]:
    """Measure the model on the test set and log it; returns the metrics, iteration and `robust_threshold`.

    Raises Stopped after the current image if a signal ends the run.
    """
    stats: list[ImageStats] = []
    panels = []
    for test, logits in evaluate(net, tests, batch_size):
        stop.check()
        stats.append(compute_stats(logits, test.ground_truth))
        panels.append(test_panel(test, logits > 0))
    all_stats = runtime.gather(stats)
    metrics = aggregate(all_stats)
    logger.test(metrics, all_stats, panels, [s.scores.iou for s in stats], iteration)
    return {"iteration": iteration, "threshold": robust_threshold(all_stats)} | metrics


def test_panel(test: EncodedTestSample, prediction: np.ndarray) -> np.ndarray:
    """Image | ground truth | prediction of a test sample, small, with its prompt drawn."""
    longest = max(test.thumbnail.shape)
    scale = longest / max(test.size)
    image = draw_points(test.thumbnail, test.points[0].numpy() * scale, test.labels[0].numpy())
    return panel(image, shrink(test.ground_truth.mask, longest), shrink(prediction, longest))


def train_panels(net: LoadedSam, train_set: TrainSet, batch: TrainBatch, logits: Tensor) -> list[np.ndarray]:
    """The same for the first samples of a training batch, at the size of the model's input."""
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

    The samples are made once more, on a finer grid, because thin cables are no wider than a pixel of the
    input of 256 px. None if no cable is seen.
    """
    spec = train_set.spec
    grid = max(spec.mask_grid, min(4 * spec.img_size, WIDTH_GRID))
    fine = TrainSet(
        train_set.datasets, spec=replace(spec, mask_grid=grid), prompt="none", seed=train_set.seed
    )
    targets = (fine[key]["target"][0].numpy() for key in fine.epoch(0)[:WIDTH_SAMPLES])
    width = median_cable_width(target > 127 for target in targets)
    return width and width * spec.img_size / grid
