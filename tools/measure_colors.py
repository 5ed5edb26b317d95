"""Measure how well a checkpoint finds cables by their color: in photos whose cables are recolored in place.

    python tools/measure_colors.py --checkpoint exp/NAME/checkpoints/last.pth --data data/cables_plain

Each photo is measured as it is, and with black, gray, white and colored cables. Prints recall, precision and
IoU by color class, each the mean over the photos.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import inference
from base.errors import UserError
from base.flag_types import positive_int
from imaging.appearance import ACHROMATIC, Color
from imaging.compositing import load_pair, recolor_in_place
from imaging.metrics import GroundTruth, compute_stats
from imaging.pairing import Pair, find_pairs

CHROMA, COLOR_LIGHTNESS = 60.0, 50.0  # of colored cables, in CIE Lab
LONGEST = 1024  # pixels


def color_classes(rng: np.random.Generator) -> dict[str, Color | None]:
    """One color of each class; None keeps the photo's own."""
    hue = rng.uniform(0, 2 * np.pi)
    colored = np.array([COLOR_LIGHTNESS, CHROMA * np.cos(hue), CHROMA * np.sin(hue)])
    grays = {name: np.array([np.mean(lightness), 0, 0]) for name, lightness in ACHROMATIC.items()}
    return {"own": None} | {name: Color(lab, 0, 0) for name, lab in ({"colored": colored} | grays).items()}


def measure(pairs: list[Pair], segment: inference.Segmenter) -> None:
    """Print the table."""
    scores: dict[str, list[tuple[float, float, float]]] = {}
    for number, pair in enumerate(pairs):
        for name, color in color_classes(np.random.default_rng(number)).items():
            image_and_mask = load_pair(pair, LONGEST).copy()
            recolor_in_place(image_and_mask, color)
            (logits,) = segment.logits([np.ascontiguousarray(image_and_mask[..., :3])])
            ground_truth = GroundTruth.from_mask(image_and_mask[..., 3] > 127)
            values = compute_stats(logits - segment.threshold, ground_truth).scores
            scores.setdefault(name, []).append((values.recall, values.precision, values.iou))
    print("color     recall  precision     IoU")
    for name, rows in scores.items():
        print("{:<8} {:7.3f} {:10.3f} {:7.3f}".format(name, *np.mean(rows, axis=0)))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a checkpoint by the color of cables.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights of any model type")
    parser.add_argument("--data", type=Path, required=True, help="folder with imgs/ and masks/")
    parser.add_argument("--every", type=positive_int, default=3, help="use every Nth photo (default: 3)")
    threshold_help = "a pixel is cable if its logit is above it (default: 0)"
    parser.add_argument("--threshold", type=float, default=0.0, help=threshold_help)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 after a message."""
    args = parse_args(argv)
    try:
        pairs, faults = find_pairs(args.data)
        if faults:
            raise UserError(faults[0])
        measure(pairs[:: args.every], inference.load(args.checkpoint, "cpu", args.threshold, tiles="off"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
