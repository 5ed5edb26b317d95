"""Measure a checkpoint whose threshold is chosen on photos like those that it will see.

    python tools/measure_threshold.py --checkpoint exp/NAME/checkpoints/last.pth --data my_test_photos

The threshold for one half of the photos is chosen on the other half, and the other way around. It is chosen
in two ways: as a training chooses it on its test set, and so that precision and recall are equal. Prints the
metrics with these thresholds and with that of the checkpoint, each the mean over all photos.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import inference
import runtime
from base.errors import UserError
from imaging.metrics import (
    MIN_IMAGES_FOR_THRESHOLD,
    GroundTruth,
    Scores,
    balanced_threshold,
    compute_stats,
    robust_threshold,
    score,
)
from imaging.pairing import Pair, find_pairs, read_pair


def measure(pairs: Sequence[Pair], segment: inference.Segmenter) -> None:
    """Print the table."""
    logits: list[np.ndarray] = []
    ground_truths: list[GroundTruth] = []
    for pair in pairs:
        image, mask = read_pair(pair)
        logits += segment.logits([image])
        ground_truths.append(GroundTruth.from_mask(mask))
    stats = list(map(compute_stats, logits, ground_truths))
    halves = stats[::2], stats[1::2]
    chosen = {
        "checkpoint": [segment.threshold] * 2,
        "training": list(map(robust_threshold, halves)),
        "balanced": list(map(balanced_threshold, halves)),
    }
    print("threshold   " + "  ".join(f"{field.name:>12}" for field in fields(Scores)))
    for name, of_half in chosen.items():
        scores = [
            astuple(score(of_image > of_half[1 - number % 2], ground_truth))  # that of the other half
            for number, (of_image, ground_truth) in enumerate(zip(logits, ground_truths, strict=True))
        ]
        print(f"{name:<12}" + "  ".join(f"{value:12.3f}" for value in np.mean(scores, axis=0)))
    for name, of_half in chosen.items():
        print(f"{name:<12}" + " and ".join(f"{threshold:g}" for threshold in of_half))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a threshold that is chosen on similar photos.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights of any model type")
    parser.add_argument("--data", type=Path, required=True, help="folder with imgs/ and masks/")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 after a message."""
    args = parse_args(argv)
    runtime.init()
    try:
        pairs, faults = find_pairs(args.data)
        if faults:
            raise UserError(faults[0])
        if len(pairs) < 2 * MIN_IMAGES_FOR_THRESHOLD:
            needed = 2 * MIN_IMAGES_FOR_THRESHOLD
            raise UserError(f"{args.data} has {len(pairs)} photos; two halves need at least {needed}")
        measure(pairs, inference.load(args.checkpoint))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
