"""Segment the cables in images or in a video with a fine-tuned checkpoint.

    python predict.py --checkpoint exp/NAME/checkpoints/best.pth --input photos --output predictions

Writes a mask (0 and 255) and an overlay for each image. With `--masks`, also compares the predictions with
the true masks.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import inference
import runtime
from base.atomic import write_text
from base.errors import UserError
from base.flag_types import number, positive_int
from imaging import media
from imaging.coco import coco_document, polygons
from imaging.files import read_image
from imaging.masks import read_mask
from imaging.media import InputImage, write_image
from imaging.metrics import GroundTruth, ImageStats, Scores, aggregate, compute_stats
from imaging.prompts import NO_PROMPT, Prompt
from imaging.visualize import PREDICTION_COLOR, overlay, panel, sheet

NEEDS_LESS_MEMORY = "a smaller --batch_size and --amp bf16 need less"
N_WORST = 4  # images in worst.jpg
tile_size = number(int, lambda value: value >= 16, "a whole number of at least 16")
SCORE_NAMES = [field.name for field in fields(Scores)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Segment the cables in images or in a video.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_path = partial(add, type=Path, required=True, default=argparse.SUPPRESS)
    add_path("--checkpoint", help="any checkpoint of this tool; the model type is detected")
    add_path("--input", help="an image, a folder of images, or a video")
    add_path("--output", help="folder for the results: masks/, overlays/ and others")
    add("--masks", type=Path, help="folder of true masks, matched by stem; scores are printed")
    add("--probabilities", action="store_true", help="also write probabilities as 16-bit PNG files")
    add("--polygons", action="store_true", help="also write polygons.json, a COCO file")
    add("--threshold", type=float, default=0.0, help="a pixel is cable if its logit is above it")
    prompt_help = "CSV or COCO file of points or boxes, for checkpoints trained with prompts"
    add("--prompt", type=Path, help=prompt_help)
    tiles_help = "cut images into overlapping tiles of this side"
    add("--tiles", type=tile_size, metavar="PIXELS", help=tiles_help)
    add("--batch_size", type=positive_int, default=4, help="images or tiles predicted together")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="device to run on")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision")
    args = parser.parse_args(argv)
    if args.tiles and args.prompt:
        parser.error("--tiles cannot be combined with --prompt: prompts are for whole images")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, 1 if some images could not be read, 2 for another failure. A bug raises."""
    runtime.init()
    args = parse_args(argv)
    faults: list[str] = []
    try:
        paths = media.find_images(args.input)
        video = paths[0] if media.is_video(paths[0]) else None
        if video and (args.masks or args.prompt):
            raise UserError(f"{video}: --masks and --prompt are for images, not for a video")
        mask_paths = media.find_masks(args.masks, paths) if args.masks else {}
        prompts = media.find_prompts(args.prompt, paths) if args.prompt else {}
        device = runtime.pick_device(args.device)
        predict = inference.load(args.checkpoint, device, runtime.amp_dtype(args.amp, device))
        options = Options(args.output, args.batch_size, args.tiles, args.threshold, args.probabilities)
        make_folders(options)
        images = media.read_frames(video, faults) if video else media.read_images(paths, mask_paths, faults)
        n_images = media.frame_count(video) if video else len(paths)
        names, stats = predict_images(predict, images, prompts, options, n_images)
        if video and names:
            folder = args.output / "overlays"
            frame_paths = [folder / f"{stem}.jpg" for stem in names]
            media.write_video(folder / f"{video.stem}.mp4", frame_paths, media.frame_rate(video))
        if args.polygons:
            write_polygons(args.output, names)
        if stats:
            report_scores(args.output, stats)
            write_worst(args.output, stats, {path.stem: path for path in paths}, mask_paths)
    except Exception as error:
        message = runtime.explain(error, NEEDS_LESS_MEMORY)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    for fault in faults:
        print(f"not predicted: {fault}", file=sys.stderr)
    return 1 if faults else 0


@dataclass(frozen=True)
class Options:
    """How images are predicted, and what is written for them."""

    output: Path  # folder of masks/, overlays/ and probabilities/
    batch_size: int  # images or tiles that are predicted together
    tile_size: int | None  # in pixels; None predicts whole images
    threshold: float  # a pixel is cable if its logit is above it
    probabilities: bool  # whether to write them


def make_folders(options: Options) -> None:
    """Create the folders that images are written to; raises UserError."""
    kinds = ["masks", "overlays", "probabilities"]
    try:
        for kind in kinds if options.probabilities else kinds[:2]:
            (options.output / kind).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {options.output}: cannot be created ({error})") from error


def predict_images(
    predict: inference.PredictLogits,
    images: Iterator[InputImage],
    prompts: Mapping[str, Sequence[Prompt]],
    options: Options,
    n_images: int,
) -> tuple[dict[str, str], dict[str, ImageStats]]:
    """Predict images and write the results; `n_images` is the expected number, for the progress bar.

    Returns:
        The name of every predicted image, and the stats of those with a true mask, both by stem.
    """
    names: dict[str, str] = {}
    stats: dict[str, ImageStats] = {}
    with tqdm(total=n_images, unit=" images", dynamic_ncols=True) as progress:
        while batch := list(islice(images, options.batch_size)):
            for image, logits in zip(batch, predict_batch(predict, batch, prompts, options), strict=True):
                write_prediction(image, logits, options)
                names[image.stem] = image.name
                if image.mask is not None:
                    ground_truth = GroundTruth.from_mask(image.mask)
                    stats[image.stem] = compute_stats(logits - options.threshold, ground_truth)
                progress.update()
    speed = len(names) / progress.format_dict["elapsed"]
    print(f"{len(names)} images, {speed:.2f} images/s, written to {options.output}")
    return names, stats


def predict_batch(
    predict: inference.PredictLogits,
    batch: list[InputImage],
    prompts: Mapping[str, Sequence[Prompt]],
    options: Options,
) -> Iterator[np.ndarray]:
    """Yield the logits float32 (H, W) of each image, predicted whole or in tiles."""
    if options.tile_size is None:
        image_prompts = [prompts.get(image.stem, NO_PROMPT) for image in batch]
        yield from predict([image.image for image in batch], image_prompts)
        return
    for image in batch:
        yield inference.predict_logits_tiled(
            predict, image.image, tile_size=options.tile_size, batch_size=options.batch_size
        )


def write_prediction(image: InputImage, logits: np.ndarray, options: Options) -> None:
    """Write the mask and the overlay of an image and, if asked for, its probabilities."""
    mask = logits > options.threshold
    write_image(options.output / "masks" / f"{image.stem}.png", mask.astype(np.uint8) * 255)
    tinted = overlay(image.image, mask, PREDICTION_COLOR)
    write_image(options.output / "overlays" / f"{image.stem}.jpg", tinted)
    if options.probabilities:
        probabilities = 0.5 * (1 + np.tanh(0.5 * logits))  # a sigmoid without overflow
        levels = np.rint(65535 * probabilities).astype(np.uint16)
        write_image(options.output / "probabilities" / f"{image.stem}.png", levels)


def write_polygons(output: Path, names: Mapping[str, str]) -> None:
    """Write `polygons.json`, a COCO file, from the masks written before; `names` are by stem."""
    masks = ((name, read_mask(output / "masks" / f"{stem}.png")) for stem, name in names.items())
    document = coco_document((name, (mask.shape[0], mask.shape[1]), polygons(mask)) for name, mask in masks)
    write_text(output / "polygons.json", json.dumps(document))


def report_scores(output: Path, stats: Mapping[str, ImageStats]) -> None:
    """Write `measures.csv` and print the same table, worst image first, and the metrics of the set."""
    rows = [(stem, astuple(image.scores)) for stem, image in stats.items()]
    rows.sort(key=lambda row: row[1][SCORE_NAMES.index("iou")])
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("picture", *SCORE_NAMES), *((stem, *values) for stem, values in rows)])
    write_text(output / "measures.csv", table.getvalue())
    rows.append(("mean", tuple(np.mean([values for _, values in rows], axis=0))))
    width = max(len("image"), *(len(stem) for stem, _ in rows))
    print("  ".join(["image".ljust(width), *(f"{name:>7}" for name in SCORE_NAMES)]))
    for stem, values in rows:
        columns = (f"{value:{max(7, len(name))}.4f}" for name, value in zip(SCORE_NAMES, values, strict=True))
        print("  ".join([stem.ljust(width), *columns]))
    summary = aggregate(list(stats.values()))
    print(", ".join(f"{name} {value:.4f}" for name, value in summary.items() if name not in SCORE_NAMES))


def write_worst(
    output: Path,
    stats: Mapping[str, ImageStats],
    image_paths: Mapping[str, Path],
    mask_paths: Mapping[str, Path],
) -> None:
    """Write `worst.jpg`: image, ground truth and prediction of the images with the lowest IoU."""
    panels = []
    for stem in sorted(stats, key=lambda stem: stats[stem].scores.iou)[:N_WORST]:
        prediction = read_mask(output / "masks" / f"{stem}.png")
        panels.append(panel(read_image(image_paths[stem]), read_mask(mask_paths[stem]), prediction))
    write_image(output / "worst.jpg", sheet(panels))


if __name__ == "__main__":
    sys.exit(main())
