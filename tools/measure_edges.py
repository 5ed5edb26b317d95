"""Measure how far the masks of photos end from the visible edge of the cables.

    python tools/measure_edges.py --data data/cables_cluttered
    python tools/measure_edges.py --data data/cables_cluttered --predictions PREDICTIONS/masks --move 1

Across the edge of a cable, the color changes from that of the cable to that of the background. The visible
edge is where half of this change has happened. Prints how far it lies outside the edge of the masks, in
pixels: above 0, the masks are thinner than the cables; below 0, they are wider. Exact masks of renders have
-0.6, probably because the sides of a cable are darker. With --predictions, prints the same for predicted
masks, and their scores against the masks as they are and against masks whose edge is moved.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from base.errors import UserError
from imaging.files import image_files
from imaging.masks import read_mask
from imaging.metrics import GroundTruth, score
from imaging.pairing import find_pairs, match_by_stem, read_pair

MAX_PLACES = 1500  # of one image
# Distances from the edge of the mask in pixels, where colors are read; those that show nothing but the cable,
# and those that show nothing but the background.
DISTANCES = np.arange(-8.0, 13.0)
CABLE, BACKGROUND = (DISTANCES >= -3) & (DISTANCES <= -2), DISTANCES >= 8
MIN_DEPTH = 1.5  # pixels inside the mask that must be reached where the cable is read
MIN_CONTRAST = 15.0  # between cable and background, in CIE Lab


def signed_distance(mask: np.ndarray) -> np.ndarray:
    """The distance of each pixel to the edge of a mask bool (H, W), float32 (H, W): below 0 inside."""
    depth, gap = (cv2.distanceTransform(side.astype(np.uint8), cv2.DIST_L2, 5) for side in (mask, ~mask))
    return np.where(mask, 0.5 - depth, gap - 0.5)


def contrast_profiles(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The share of the cable's color at each of `DISTANCES`: 1 on the cable, 0 on the background.

    Args:
        image: RGB uint8 (H, W, 3).
        mask: bool (H, W).

    Returns:
        float32 (n, 21), one row for each place on the edge that can be measured: the cable is wide enough, no
        other cable is near, and the colors differ.
    """
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    distance = signed_distance(mask)
    places = np.argwhere(mask & (distance > -1))
    if not len(places):
        return np.empty((0, len(DISTANCES)), np.float32)
    y, x = np.random.default_rng(0).permutation(places)[:MAX_PLACES].T
    smooth = cv2.GaussianBlur(distance, (0, 0), 1.5)
    outward = np.stack([cv2.Sobel(smooth, cv2.CV_32F, *axis)[y, x] for axis in ((1, 0), (0, 1))])
    outward /= np.maximum(np.linalg.norm(outward, axis=0), 1e-6)
    # The edge lies half a pixel beyond the center of the last pixel of the mask.
    lines = np.stack([x, y])[..., None] + (DISTANCES + 0.5) * outward[..., None]
    read = partial(cv2.remap, interpolation=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    colors, distances = (read(values, *lines.astype(np.float32)) for values in (lab, distance))
    cable, background = (np.median(colors[:, part], axis=1) for part in (CABLE, BACKGROUND))
    change = cable - background
    squared = np.sum(change**2, axis=1)
    is_deep = np.all(distances[:, CABLE] < -MIN_DEPTH, axis=1)
    is_alone = distances[:, -1] > DISTANCES[-1] - 2
    usable = is_deep & is_alone & (squared > MIN_CONTRAST**2)
    shares = np.einsum("ndc,nc->nd", colors - background[:, None], change)
    return shares[usable] / squared[usable, None]


def visible_edge(profile: np.ndarray) -> float:
    """The distance at which a profile (21,) falls below one half, in pixels."""
    last = int(np.flatnonzero(profile[:-1] >= 0.5)[-1])
    return float(DISTANCES[last] + (profile[last] - 0.5) / (profile[last] - profile[last + 1]))


ImageAndMask = tuple[np.ndarray, np.ndarray]  # RGB uint8 (H, W, 3), bool (H, W)


def read_data(data_dir: Path, predictions: Path | None) -> tuple[list[ImageAndMask], list[np.ndarray]]:
    """Read a folder of imgs/ and masks/, and the predicted masks of the same stems; raises UserError."""
    pairs, faults = find_pairs(data_dir)
    if faults:
        raise UserError(faults[0])
    predicted = []
    if predictions is not None:
        matched, missing, _ = match_by_stem((pair.image_path for pair in pairs), image_files(predictions))
        if missing:
            raise UserError(f"{missing[0]}: has no mask in {predictions}; run predict.py on all images")
        paths = dict(matched)
        predicted = [read_mask(paths[pair.image_path]) for pair in pairs]
    read = [read_pair(pair) for pair in pairs]
    for pair, (_, mask), prediction in zip(pairs, read, predicted, strict=False):
        if mask.shape != prediction.shape:
            raise UserError(
                f"{paths[pair.image_path]}: is {prediction.shape} but {pair.mask_path} is {mask.shape} "
                "(h, w); expected the masks that predict.py writes for these images"
            )
    return read, predicted


def print_edge(name: str, images_and_masks: Iterable[ImageAndMask]) -> None:
    """Print a row: the number of images and of places, and the mean distance of the visible edge."""
    profiles = [contrast_profiles(*pair) for pair in images_and_masks]
    medians = [np.median(places, axis=0) for places in profiles if len(places)]
    if not medians:
        raise UserError(
            f"{name}: their edge can be measured nowhere; cables must be 7 pixels wide and differ from their "
            "background"
        )
    edge = visible_edge(np.mean(medians, axis=0))
    print(f"{name:<12} {len(medians):6d} {sum(map(len, profiles)):7d} {edge:+18.1f}")


def print_scores(name: str, masks: Sequence[np.ndarray], predicted: list[np.ndarray], move: float) -> None:
    """Print a row: the mean scores against masks whose edge is moved outward by `move` pixels."""
    truths = (GroundTruth.from_mask(signed_distance(mask) < move) for mask in masks)
    scores = [score(prediction, truth) for prediction, truth in zip(predicted, truths, strict=True)]
    means = np.mean([(each.iou, each.precision, each.recall) for each in scores], axis=0)
    print("{:<25} {:5.3f} {:10.3f} {:7.3f}".format(name, *means))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how far masks end from the visible edge of cables.")
    parser.add_argument("--data", type=Path, required=True, help="folder with imgs/ and masks/")
    parser.add_argument("--predictions", type=Path, help="folder of predicted masks, matched by stem")
    move_help = "also score against masks whose edge is moved outward by so many pixels (default: 0)"
    parser.add_argument("--move", type=float, default=0.0, help=move_help)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 after a message."""
    args = parse_args(argv)
    try:
        pairs, predicted = read_data(args.data, args.predictions)
        images, masks = zip(*pairs, strict=True)
        print("             images  places  visible edge (px)")
        print_edge("masks", pairs)
        if predicted:
            print_edge("predictions", zip(images, predicted, strict=True))
            print("\nscores of predictions       IoU  precision  recall")
            print_scores("masks as they are", masks, predicted, 0)
        if predicted and args.move:
            print_scores(f"masks moved by {args.move:+.1f} px", masks, predicted, args.move)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
