"""Segment the cables in images, videos, or what a camera sees, with a fine-tuned checkpoint.

    python predict.py --checkpoint exp/NAME/checkpoints/best.pth --input FOLDER --output predictions

Writes a mask (0 and 255) and an overlay for each image. With `--masks`, also compares the predictions with
the ground truth masks.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from base.flag_types import MAX_PIXELS, MIN_TILE, answer_first, number, path, positive, positive_int, source

tile_size = number(
    lambda text: text if text in ("auto", "off") else int(text),
    lambda value: isinstance(value, str) or value >= MIN_TILE,
    f"a whole number of at least {MIN_TILE}, auto or off",
)
finite = number(float, math.isfinite, "a finite number")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Segment the cables in images, videos, or what a camera sees."
    )
    checkpoint_help = "a checkpoint of this tool or of another one; the model type is detected"
    parser.add_argument("--checkpoint", type=path, required=True, help=checkpoint_help)
    input_help = "an image, a video, a folder of these, the URL of a stream, or the number of a camera"
    parser.add_argument("--input", type=source, required=True, help=input_help)
    output_help = "folder for the results: masks/, overlays/ and others"
    parser.add_argument("--output", type=path, required=True, help=output_help)
    masks_help = "folder of ground truth masks, matched by stem: prints metrics"
    parser.add_argument("--masks", type=path, help=masks_help)
    add_outputs(parser.add_argument_group("additional output").add_argument)
    add_settings(parser.add_argument_group("prediction").add_argument)
    args = parser.parse_args(argv)
    if args.tiles not in (None, "off") and args.prompt:
        parser.error("--tiles cannot be combined with --prompt: prompts are for whole images")
    if args.cable_width and (args.tiles not in (None, "auto") or args.prompt):
        parser.error("--cable_width is for --tiles auto")
    return args


def add_outputs(add: Callable[..., Any]) -> None:
    """Add the flags that choose what is written besides masks and overlays."""
    add("--centerlines", action="store_true", help="the centerline of each cable, as JSON and drawn")
    add("--instances", action="store_true", help="the id of the cable at each pixel, as 16-bit PNG files")
    add("--probabilities", action="store_true", help="probabilities, as 16-bit PNG files")
    add("--polygons", action="store_true", help="polygons.json, a COCO file of the regions of the masks")
    add("--rle", action="store_true", help="rle.json: these regions as run-length encoding")
    area_help = "leave smaller regions, in pixels, out of --polygons and --rle (default: 1)"
    add("--min_area", type=positive_int, default=1, help=area_help)


def add_settings(add: Callable[..., Any]) -> None:
    """Add the flags that change how images are predicted."""
    threshold_help = "a pixel is cable if its logit is above it (default: that of the sidecar, else 0)"
    add("--threshold", type=finite, help=threshold_help)
    tiles_help = (
        "predict overlapping tiles of this side; auto: tiles in which cables are as wide as in training, and "
        "the whole image; off: only the whole image (default: auto if the width of cables in training is "
        "known; off for videos and with --prompt)"
    )
    add("--tiles", type=tile_size, metavar="PIXELS", help=tiles_help)
    width_help = "--tiles auto: width of cables in training, in pixels of the model's input"
    add("--cable_width", type=positive, metavar="PIXELS", help=f"{width_help} (default: the sidecar's)")
    prompt_help = "CSV or COCO file of points or boxes, for checkpoints trained with prompts"
    add("--prompt", type=path, help=prompt_help)
    batch_help = "images or tiles predicted together (default: 4)"
    add("--batch_size", type=positive_int, default=4, help=batch_help)
    pixels_help = f"largest number of pixels of an image; larger ones are left out (default: {MAX_PIXELS})"
    add("--max_pixels", type=positive_int, default=MAX_PIXELS, help=pixels_help)
    device_help = "auto: the first available of cuda, mps, cpu (default: auto)"
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help=device_help)
    amp_help = "mixed precision; auto: what the hardware computes fast (default: auto)"
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help=amp_help)


if __name__ == "__main__":
    answer_first(parse_args, ("checkpoint", "input", "masks", "prompt"))

import csv
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import islice

import numpy as np
from tqdm import tqdm

import inference
import runtime
from base.errors import UserError
from imaging import media
from imaging.centerlines import cables_document, centerlines, find_crossings, instance_mask
from imaging.coco import Region, coco_document, polygons, run_lengths
from imaging.files import first_few, read_image
from imaging.masks import read_mask
from imaging.media import InputFile, InputImage, Video
from imaging.metrics import GroundTruth, ImageStats, Scores, aggregate, compute_stats
from imaging.output_folder import (
    CENTERLINES,
    INSTANCES,
    LIST_NAME,
    MASKS,
    OVERLAYS,
    PROBABILITIES,
    OutputFolder,
)
from imaging.prompts import Prompt
from imaging.visualize import caption, draw_cables, label, overlay, panel, sheet
from sidecar import sidecar_path

MEMORY_HINT = "a smaller --batch_size and --amp bf16 need less"
N_WORST = 4  # images in worst.jpg
MAX_SHARE = 0.5  # of the pixels of an image; cables cover a few percent
SCORE_NAMES = [field.name for field in fields(Scores)]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns an exit code of docs/prediction.md. A bug raises."""
    runtime.init()
    args = parse_args(argv)
    faults: list[str] = []
    try:
        with runtime.interrupt_on_signals():
            run(args, faults)
    except runtime.Interrupted as signal:
        written = args.output / LIST_NAME
        lists = f"{written} lists the files written so far" if written.exists() else "nothing was written"
        print(f"interrupted by {signal.name}: {lists}", file=sys.stderr)
        return signal.exit_code
    except Exception as error:
        message = runtime.user_message(error, MEMORY_HINT)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def run(args: argparse.Namespace, faults: list[str]) -> None:
    """Predict what the flags say. What is left out is appended to `faults`; raises UserError."""
    images, videos = media.find_inputs(args.input)
    print(describe_unread(media.find_unread(args.input)), end="", file=sys.stderr)
    videos = check_videos(args, images, videos, faults)
    mask_paths = media.find_masks(args.masks, images) if args.masks else {}
    prompts = media.find_prompts(args.prompt, images, args.max_pixels) if args.prompt else {}
    inputs = [args.input, args.masks, args.checkpoint, args.prompt, *mask_paths.values()]
    inputs += [*(file.path for file in images), *(video.source for video in videos)]
    output = OutputFolder(args.output, [path for path in inputs if isinstance(path, Path)])
    segment = load_segmenter(args)
    options = Options(
        output, args.batch_size, args.threshold, args.probabilities, args.centerlines, args.instances
    )
    start_output(output, args, images, videos, options)
    names: dict[str, str] = {}
    stats: dict[str, ImageStats] = {}
    try:
        if images:
            read = media.read_images(images, mask_paths, args.max_pixels, faults)
            names, stats = predict_images(segment, read, prompts, options, len(images))
        for_frames = segment if args.tiles or args.cable_width else replace(segment, tiles=None)
        for video in videos:
            names |= predict_video(for_frames, video, options, faults)
        if args.polygons:
            write_regions(output, names, "polygons.json", partial(polygons, min_area=args.min_area))
        if args.rle:
            write_regions(output, names, "rle.json", partial(run_lengths, min_area=args.min_area))
        if stats:
            print(describe_large_masks(stats, mask_paths), end="", file=sys.stderr)
            report_scores(output, stats, options.threshold)
            write_worst(output, stats, {file.stem: file.path for file in images}, mask_paths)
    finally:
        output.finish()


def describe_unread(paths: Sequence[Path]) -> str:
    """A line if there are photos whose format is not read."""
    if not paths:
        return ""
    names = first_few([path.name for path in paths])
    return f"note: {len(paths)} file(s) are not predicted, because their format is not read: {names}\n"


def check_videos(
    args: argparse.Namespace, images: list[InputFile], videos: list[Video], faults: list[str]
) -> list[Video]:
    """The videos that can be decoded. The others of a folder are faults; a single one raises UserError."""
    if videos and (args.masks or args.prompt):
        raise UserError(f"{videos[0].name}: --masks and --prompt are for images, not for a video")
    if len(videos) == 1 and not images:
        media.require_video(videos[0])
        return videos
    readable = [video for video in videos if media.has_frames(video.source)]
    faults += [
        f"not predicted: {video.name}: no frame can be decoded" for video in videos if video not in readable
    ]
    if not images and not readable:
        raise UserError(f"--input {args.input}: no frame of its {len(videos)} videos can be decoded")
    return readable


def load_segmenter(args: argparse.Namespace) -> inference.Segmenter:
    """Load the checkpoint. Prints which threshold is used, and sets `args.threshold` to it."""
    segment = inference.load(
        args.checkpoint,
        args.device,
        args.threshold,
        tiles=args.tiles,
        cable_width=args.cable_width,
        batch_size=args.batch_size,
        amp=args.amp,
    )
    name = sidecar_path(args.checkpoint).name
    origin = f"from {name}" if segment.sidecar else f"the default, without {name}"
    if args.threshold is not None:
        origin = "--threshold"
    print(f"threshold {segment.threshold:g} ({origin})")
    if args.prompt and segment.sidecar and segment.sidecar.prompt == "none":
        print(
            f"warning: {args.checkpoint} was trained without prompts; --prompt may make its masks worse",
            file=sys.stderr,
        )
    if not args.prompt:
        segment.warn_of_missing_prompts()  # before the progress bar is shown
    args.threshold = segment.threshold
    return segment


@dataclass(frozen=True)
class Options:
    """How images are predicted, and what is written for them."""

    output: OutputFolder
    batch_size: int  # images that are predicted together
    threshold: float  # a pixel is cable if its logit is above it
    probabilities: bool  # whether to write them
    centerlines: bool  # whether to write them
    instances: bool  # whether to write the instance masks

    def names(self, stem: str) -> list[str]:
        """The files of an image, relative to the output folder."""
        names = [f"{MASKS}/{stem}.png", f"{OVERLAYS}/{stem}.jpg"]
        names += [f"{PROBABILITIES}/{stem}.png"] if self.probabilities else []
        names += [f"{CENTERLINES}/{stem}.json", f"{CENTERLINES}/{stem}.jpg"] if self.centerlines else []
        names += [f"{INSTANCES}/{stem}.png"] if self.instances else []
        return names


def start_output(
    output: OutputFolder,
    args: argparse.Namespace,
    images: list[InputFile],
    videos: list[Video],
    options: Options,
) -> None:
    """Remove the files of an earlier prediction, and list those of this one but frames; raises UserError."""
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    flags["input"] = media.without_password(args.input)
    about = {"tool": "predict.py", "checkpoint": str(args.checkpoint), "flags": flags}
    names = [name for file in images for name in options.names(file.stem)]
    names += [overlay_video(video) for video in videos]
    removed = output.start(about, names)
    if removed:
        print(f"replaced {removed} files of an earlier prediction in {output.path}")


def overlay_video(video: Video) -> str:
    """The name of the video of overlays, relative to the output folder."""
    return f"{OVERLAYS}/{video.stem}.mp4"


def predict_video(
    segment: inference.Segmenter, video: Video, options: Options, faults: list[str]
) -> dict[str, str]:
    """Predict the frames of a video and join their overlays to a video; returns their names by stem.

    Of a camera or a stream, the newest frame is predicted, until it ends or a signal ends it.
    """
    if media.is_live(video):
        options = replace(options, batch_size=1)  # a batch would wait for frames
        rate = None
    else:
        rate = media.frame_rate(video.source)
    expected = media.frame_count(video.source)
    name = overlay_video(video)
    with media.VideoWriter(options.output.path / name, rate) as writer:
        if rate is None:
            with runtime.StopRequest("the results are written") as stop:
                frames = media.read_newest_frames(video, lambda: stop.signal is not None)
                names, _ = predict_images(segment, announced(frames, video, options), {}, options, 0, writer)
        else:
            frames = announced(media.read_frames(video), video, options)
            names, _ = predict_images(segment, frames, {}, options, expected, writer)
        writer.finish()
    if names:  # a camera may end before its first frame; then there is no video
        options.output.add(name)
    if len(names) < expected:
        shortfall = f"{video.name}: of {expected} frames that its header states, {len(names)} can be decoded"
        if 2 * len(names) < expected:
            faults.append(f"not predicted: {shortfall}")
        else:
            print(f"note: {shortfall}; headers of trimmed clips often state too many", file=sys.stderr)
    return names


FRAMES_AT_ONCE = 1000  # of a video that are listed together: every time, the whole list is written


def announced(frames: Iterator[InputImage], video: Video, options: Options) -> Iterator[InputImage]:
    """Yield the frames, and list the files of each before they are written.

    The number of frames in a header is not used for this: it may be wrong by billions.
    """
    for index, frame in enumerate(frames):
        if index % FRAMES_AT_ONCE == 0:
            stems = [media.frame_stem(video.stem, index + ahead) for ahead in range(FRAMES_AT_ONCE)]
            options.output.announce(name for stem in stems for name in options.names(stem))
        yield frame


# The rate is always images/s; by default, tqdm shows the reciprocal below 1.
PROGRESS_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


def predict_images(
    segment: inference.Segmenter,
    images: Iterator[InputImage],
    prompts: Mapping[str, Sequence[Prompt]],
    options: Options,
    n_images: int,
    video: media.VideoWriter | None = None,
) -> tuple[dict[str, str], dict[str, ImageStats]]:
    """Predict images and write the results.

    Args:
        n_images: the expected number, for the progress bar; 0 if it is not known.
        video: also takes the overlays.

    Returns:
        The name of every predicted image, and the stats of those with a true mask, both by stem.
    """
    names: dict[str, str] = {}
    stats: dict[str, ImageStats] = {}
    tile_sizes: list[int | None] = []
    shares: list[float] = []
    start = time.perf_counter()
    with tqdm(
        total=n_images or None, unit=" images", dynamic_ncols=True, bar_format=PROGRESS_FORMAT
    ) as progress:
        while batch := list(islice(images, options.batch_size)):
            if not names:
                warn_of_small_tiles(segment, batch[0].image)
            options.output.announce(name for image in batch for name in options.names(image.stem))
            given = [prompts[image.stem] for image in batch] if prompts else None
            predicted = segment.logits_and_tiles([image.image for image in batch], given)
            for image, (logits, tile_size) in zip(batch, predicted, strict=True):
                tile_sizes.append(tile_size)
                if image.mask is not None:
                    ground_truth = GroundTruth.from_mask(image.mask)
                    stats[image.stem] = compute_stats(logits - options.threshold, ground_truth)
                shares.append(write_prediction(image, logits, stats.get(image.stem), options, video))
                names[image.stem] = image.name
                progress.update()
    if segment.tiles == "auto" and not prompts:
        print(describe_tiles(tile_sizes))
    speed = len(names) / (time.perf_counter() - start)
    print(f"{len(names)} images, {speed:.2f} images/s, written to {options.output.path}")
    print(describe_shares(shares), end="", file=sys.stderr)
    return names, stats


TOO_SMALL = 0.5  # of the side of tiles in which cables are as wide as in training


def warn_of_small_tiles(segment: inference.Segmenter, image: np.ndarray) -> None:
    """Warn if tiles of a given side show the cables of an image much wider than those of the training."""
    if not isinstance(segment.tiles, int) or not segment.cable_width:
        return
    (whole,) = replace(segment, tiles=None).logits([image])
    fitting = segment.fitting_side(whole)
    if fitting and segment.tiles < TOO_SMALL * fitting:
        tqdm.write(
            f"warning: in tiles of {segment.tiles} px, cables are about {fitting / segment.tiles:.1f} times "
            f"as wide as in training, and their masks may be bad; --tiles {fitting} would fit",
            file=sys.stderr,
        )


def describe_shares(shares: Sequence[float]) -> str:
    """A line if masks are empty or cover most of their image, which suggests too little training."""
    empty, full = sum(share == 0 for share in shares), sum(share > MAX_SHARE for share in shares)
    if not empty and not full:
        return ""
    return f"note: {empty} of {len(shares)} masks are empty, and {full} cover more than half of the image\n"


def describe_tiles(tile_sizes: Sequence[int | None]) -> str:
    """A line about the tiles that --tiles auto chose."""
    sides = [side for side in tile_sizes if side]
    tiled = ""
    if sides:
        extremes = dict.fromkeys([min(sides), max(sides)])
        tiled = f"{len(sides)} in tiles of {' to '.join(map(str, extremes))} px, "
    return f"tiles auto, of {len(tile_sizes)} images: {tiled}{len(tile_sizes) - len(sides)} whole"


def write_prediction(
    image: InputImage,
    logits: np.ndarray,
    stats: ImageStats | None,
    options: Options,
    video: media.VideoWriter | None,
) -> float:
    """Write the mask and the overlay of an image and, if asked for, its probabilities and cables.

    Returns the share of its pixels that are cable.
    """
    mask = logits > options.threshold
    drawn = draw_overlay(image, mask, stats)
    if video is not None:
        video.write(drawn)
    arrays = [mask.astype(np.uint8) * 255, drawn]
    if options.probabilities:
        arrays.append(np.rint(65535 * inference.sigmoid(logits)).astype(np.uint16))
    contents = [media.encode_image(array, ".png" if array.ndim == 2 else ".jpg") for array in arrays]
    if options.centerlines or options.instances:
        contents += encode_cables(image, mask, options)
    for name, content in zip(options.names(image.stem), contents, strict=True):
        options.output.write(name, content)
    return float(mask.mean())


def draw_overlay(image: InputImage, mask: np.ndarray, stats: ImageStats | None) -> np.ndarray:
    """The prediction on its image, with its name and its IoU or, without a true mask, its share of cable."""
    number = f"IoU {stats.scores.iou:.3f}" if stats else f"{mask.mean():.1%} cable"
    drawn = overlay(image.image, mask, image.mask)
    return label(drawn, f"{number}  {image.name}", with_legend=stats is not None)


def encode_cables(image: InputImage, mask: np.ndarray, options: Options) -> list[bytes]:
    """The files of the cables of an image: centerlines and their drawing, instance mask, as asked for."""
    cables = centerlines(mask)
    contents = []
    if options.centerlines:
        document = cables_document(image.name, (mask.shape[0], mask.shape[1]), cables)
        contents.append(json.dumps(document).encode(errors="surrogateescape"))
        drawn = draw_cables(image.image, cables, find_crossings(cables))
        contents.append(media.encode_image(drawn, ".jpg"))
    if options.instances:
        contents.append(media.encode_image(instance_mask(mask, cables), ".png"))
    return contents


def write_regions(
    output: OutputFolder,
    names: Mapping[str, str],
    file_name: str,
    describe: Callable[[np.ndarray], list[Region]],
) -> None:
    """Write a COCO file of the regions of the masks written before; `names` are by stem."""
    masks = ((name, read_mask(output.path / MASKS / f"{stem}.png")) for stem, name in names.items())
    document = coco_document((name, (mask.shape[0], mask.shape[1]), describe(mask)) for name, mask in masks)
    output.write(file_name, json.dumps(document).encode())


def report_scores(output: OutputFolder, stats: Mapping[str, ImageStats], threshold: float) -> None:
    """Write `measures.csv` and print the same table, worst image first, and the metrics of the set.

    The stats are of logits minus `threshold`.
    """
    rows = [(stem, astuple(image.scores)) for stem, image in stats.items()]
    rows.sort(key=lambda row: row[1][SCORE_NAMES.index("iou")])
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("picture", *SCORE_NAMES), *((stem, *values) for stem, values in rows)])
    output.write("measures.csv", table.getvalue().encode(errors="surrogateescape"))
    rows.append(("mean", tuple(np.mean([values for _, values in rows], axis=0))))
    width = max(len("image"), *(len(stem) for stem, _ in rows))
    print("  ".join(["image".ljust(width), *(f"{name:>7}" for name in SCORE_NAMES)]))
    for stem, values in rows:
        columns = (f"{value:{max(7, len(name))}.4f}" for name, value in zip(SCORE_NAMES, values, strict=True))
        print("  ".join([stem.ljust(width), *columns]))
    summary = aggregate(list(stats.values()))
    summary["best_threshold"] += threshold
    print(", ".join(f"{name} {value:.4f}" for name, value in summary.items() if name not in SCORE_NAMES))


def describe_large_masks(stats: Mapping[str, ImageStats], mask_paths: Mapping[str, Path]) -> str:
    """A line if true masks cover more than half of their image, which suggests that they are inverted."""
    large = [stem for stem, image in stats.items() if image.pixel_counts[1] > image.pixel_counts[0]]
    if not large:
        return ""
    first = mask_paths[large[0]]
    return (
        f"note: foreground covers more than half of {len(large)} mask(s), e.g. {first}: are they inverted?\n"
    )


def write_worst(
    output: OutputFolder,
    stats: Mapping[str, ImageStats],
    image_paths: Mapping[str, Path],
    mask_paths: Mapping[str, Path],
) -> None:
    """Write `worst.jpg`: the images with the lowest IoU, each beside what was found, missed and wrong."""
    panels = []
    for stem in sorted(stats, key=lambda stem: stats[stem].scores.iou)[:N_WORST]:
        prediction = read_mask(output.path / MASKS / f"{stem}.png")
        compared = panel(read_image(image_paths[stem]), read_mask(mask_paths[stem]), prediction)
        text = f"IoU {stats[stem].scores.iou:.3f}  {image_paths[stem].name}"
        panels.append(caption(compared, text))
    output.write("worst.jpg", media.encode_image(sheet(panels), ".jpg"))


if __name__ == "__main__":
    sys.exit(main())
