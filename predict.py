"""Find the cables in pictures or a video with a fine-tuned checkpoint.

    python predict.py --checkpoint exp/NAME/checkpoints/best.pth --input photos --output found

Writes a mask (0 and 255) and an overlay per picture; with the true masks given, also measures them.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import runtime
from base import atomic
from base.errors import UserError
from imaging.coco import coco_document, polygons, read_prompts
from imaging.files import read_image, read_mask
from imaging.media import (
    Picture,
    find_pictures,
    find_truths,
    frame_count,
    is_video,
    read_frames,
    read_pictures,
    write_picture,
    write_video,
)
from imaging.metrics import GroundTruth, ImageStats, Scores, aggregate, compute_stats
from imaging.visualize import PREDICTION_COLOR, overlay, panel, sheet
from inference import NO_PROMPT, PredictLogits, Prompt, load, predict_logits_tiled

WORST = 4  # pictures shown of those that agree least with their truth


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Find the cables in pictures.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    required = {"type": Path, "required": True, "default": argparse.SUPPRESS}
    parser.add_argument("--checkpoint", **required, help="weights, of any variant and of any --train")
    parser.add_argument("--input", **required, help="a picture, a folder of them, or a video")
    parser.add_argument("--output", **required, help="folder for masks/ and overlays/")
    parser.add_argument("--masks", type=Path, help="folder of true masks, by stem: measures are printed")
    parser.add_argument("--probabilities", action="store_true", help="write them too, as PNG of 16 bits")
    parser.add_argument("--polygons", action="store_true", help="write them too, as polygons.json (COCO)")
    parser.add_argument("--threshold", type=float, default=0.0, help="logits above it are cable")
    parser.add_argument(
        "--prompt", type=Path, help="CSV or COCO file of points or boxes, for weights trained with prompts"
    )
    parser.add_argument(
        "--tiles", type=int, metavar="PIXELS", help="cut larger pictures into overlapping tiles of this side"
    )
    parser.add_argument("--batch_size", type=int, default=4, help="pictures or tiles at a time")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="where")
    parser.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="precision")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"argument --batch_size: expected at least 1, got {args.batch_size}")
    if args.tiles is not None and args.tiles < 16:
        parser.error(f"argument --tiles: expected at least 16 pixels, got {args.tiles}")
    if args.tiles and args.prompt:
        parser.error("--tiles goes without --prompt: a tile has no part of a prompt")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 if some pictures could not be read, 2 for any other failure."""
    runtime.init()
    args = parse_args(argv)
    unreadable = []
    try:
        paths = find_pictures(args.input)
        video = paths[0] if is_video(paths[0]) else None
        if video and (args.masks or args.prompt):
            raise UserError(f"{video}: --masks and --prompt are for pictures, not for a video")
        truths = find_truths(args.masks, paths) if args.masks else {}
        prompts = find_prompts(args.prompt, paths) if args.prompt else {}
        device = runtime.pick_device(args.device)
        predict_logits = load(args.checkpoint, device, runtime.amp_dtype(args.amp, device))
        pictures = read_frames(video, unreadable) if video else read_pictures(paths, truths, unreadable)
        bar = tqdm(total=frame_count(video) if video else len(paths), unit=" images", dynamic_ncols=True)
        found, measured = predict(args, predict_logits, pictures, prompts, bar)
        if video and found:
            write_video(args.output, video, found)
        if args.polygons:
            write_polygons(args.output, found)
        if measured:
            report_scores(args.output, measured)
            show_worst(args.output, measured, paths, truths)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for fault in unreadable:
        print(f"not predicted: {fault}", file=sys.stderr)
    return 1 if unreadable else 0


def predict(
    args: argparse.Namespace,
    predict_logits: PredictLogits,
    pictures: Iterator[Picture],
    prompts: dict[str, list[Prompt]],
    bar: tqdm,
) -> tuple[dict[str, str], dict[str, ImageStats]]:
    """Write what is found in every picture; returns names by stem, and measures of those with a truth."""
    for kind in ("masks", "overlays", *(["probabilities"] if args.probabilities else [])):
        (args.output / kind).mkdir(parents=True, exist_ok=True)
    names, measured = {}, {}
    with bar:
        while batch := list(islice(pictures, args.batch_size)):
            for picture, logits in zip(batch, find(args, predict_logits, batch, prompts), strict=True):
                write(args, picture, logits)
                names[picture.stem] = picture.name
                if picture.truth is not None:
                    measured[picture.stem] = compute_stats(
                        logits - args.threshold, GroundTruth.from_mask(picture.truth)
                    )
                bar.update()
    speed = len(names) / bar.format_dict["elapsed"]
    print(f"{len(names)} pictures, {speed:.2f} images/s, written to {args.output}")
    return names, measured


def find(
    args: argparse.Namespace,
    predict_logits: PredictLogits,
    batch: list[Picture],
    prompts: dict[str, list[Prompt]],
) -> Iterator[np.ndarray]:
    """Logits (H, W) of each picture, whole or in tiles."""
    if args.tiles:
        for picture in batch:
            yield predict_logits_tiled(
                predict_logits, picture.image, tile_size=args.tiles, batch_size=args.batch_size
            )
    else:
        given = [prompts.get(picture.stem, NO_PROMPT) for picture in batch]
        yield from predict_logits([picture.image for picture in batch], given)


def find_prompts(path: Path, pictures: list[Path]) -> dict[str, list[Prompt]]:
    """The prompts by stem; raises UserError naming the first picture without one."""
    prompts = read_prompts(path)
    for picture in pictures:
        if picture.stem not in prompts:
            raise UserError(f"--prompt {path}: no prompt for {picture.name}")
    return prompts


def write(args: argparse.Namespace, picture: Picture, logits: np.ndarray) -> None:
    """Write a picture's mask, overlay and, if asked for, probabilities, each whole or not at all."""
    mask = logits > args.threshold
    tinted = overlay(picture.image, mask, PREDICTION_COLOR)
    files = {f"masks/{picture.stem}.png": mask.astype(np.uint8) * 255, f"overlays/{picture.stem}.jpg": tinted}
    if args.probabilities:
        probabilities = 0.5 * (1 + np.tanh(0.5 * logits))
        files[f"probabilities/{picture.stem}.png"] = np.rint(65535 * probabilities).astype(np.uint16)
    for name, array in files.items():
        write_picture(args.output / name, array)


def write_polygons(output: Path, names: dict[str, str]) -> None:
    """Write `polygons.json`, a COCO file of the masks."""
    masks = ((name, read_mask(output / "masks" / f"{stem}.png")) for stem, name in names.items())
    text = json.dumps(coco_document([(name, mask.shape, polygons(mask)) for name, mask in masks]))
    atomic.write_atomically(output / "polygons.json", lambda file: file.write(text.encode()))


def report_scores(output: Path, measured: dict[str, ImageStats]) -> None:
    """Write the measures of every picture, the worst first, as `measures.csv`; print them and the set's."""
    names = [field.name for field in fields(Scores)]
    rows = [(stem, *(getattr(m.scores, name) for name in names)) for stem, m in measured.items()]
    rows.sort(key=lambda row: row[1 + names.index("iou")])
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("picture", *names), *rows])
    atomic.write_atomically(output / "measures.csv", lambda file: file.write(table.getvalue().encode()))
    rows.append(("mean", *np.mean([values for _, *values in rows], axis=0)))
    width = max(len(stem) for stem, *_ in rows)
    print("  ".join(["picture".ljust(width), *(f"{name:>7}" for name in names)]))
    for stem, *values in rows:
        columns = (f"{value:{max(7, len(name))}.4f}" for name, value in zip(names, values, strict=True))
        print("  ".join([stem.ljust(width), *columns]))
    summary = aggregate(list(measured.values()))
    print(", ".join(f"{name} {value:.4f}" for name, value in summary.items() if name not in names))


def show_worst(
    output: Path, measured: dict[str, ImageStats], paths: list[Path], truths: dict[str, Path]
) -> None:
    """Write `worst.jpg`: image, truth and prediction of the pictures with the least IoU."""
    images = {path.stem: path for path in paths}
    panels = []
    for stem in sorted(measured, key=lambda stem: measured[stem].scores.iou)[:WORST]:
        found = read_mask(output / "masks" / f"{stem}.png")
        panels.append(panel(read_image(images[stem]), read_mask(truths[stem]), found))
    write_picture(output / "worst.jpg", sheet(panels))


if __name__ == "__main__":
    sys.exit(main())
