"""Find the cables in pictures with a fine-tuned checkpoint, without prompts.

    python predict.py --checkpoint exp/NAME/checkpoints/best.pth --input photos --output found

Writes a mask (0 and 255) and an overlay per picture; with the true masks given, also measures them.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from segment_anything.modeling import Sam
from tqdm import tqdm

import checkpoint
import model
from dataset import IMAGE_SUFFIXES, Frame, check_size, model_input, read_image, read_mask
from metrics import Scores, Truth, score
from visualize import PREDICTION_COLOUR, overlay, panel, sheet

# From pictures, RGB uint8 (H, W, 3), to their masks, bool (H, W).
FindCables = Callable[[list[np.ndarray]], Iterator[np.ndarray]]
WORST = 4  # pictures shown of those that agree least with their truth


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Find the cables in pictures.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    required = {"type": Path, "required": True, "default": argparse.SUPPRESS}
    parser.add_argument("--checkpoint", **required, help="weights, of any variant and of any --train")
    parser.add_argument("--input", **required, help="a picture, or a folder of them")
    parser.add_argument("--output", **required, help="folder for masks/ and overlays/")
    parser.add_argument("--masks", type=Path, help="folder of true masks, by stem: measures are printed")
    parser.add_argument("--batch_size", type=int, default=4, help="pictures at a time")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="where")
    parser.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="precision")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"argument --batch_size: expected at least 1, got {args.batch_size}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 if some pictures could not be read, 2 for any other failure."""
    args = parse_args(argv)
    try:
        pictures = find_pictures(args.input)
        truths = find_truths(args.masks, pictures) if args.masks else {}
        device = model.pick_device(args.device)
        amp = model.amp_dtype(args.amp, device)
        find_cables = load(args.checkpoint, device, amp)
        results, unreadable = predict(args, find_cables, pictures, truths)
        if results:
            print_scores(results)
            show_worst(args.output, results, truths)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for fault in unreadable:
        print(f"not predicted: {fault}", file=sys.stderr)
    return 1 if unreadable else 0


def predict(
    args: argparse.Namespace, find_cables: FindCables, pictures: list[Path], truths: dict[Path, Path]
) -> tuple[dict[Path, Scores], list[str]]:
    """Write a mask and an overlay of every picture; returns scores against the truths, and what failed."""
    (args.output / "masks").mkdir(parents=True, exist_ok=True)
    (args.output / "overlays").mkdir(exist_ok=True)
    results, unreadable = {}, []
    bar = tqdm(total=len(pictures), unit=" images", dynamic_ncols=True)
    for start in range(0, len(pictures), args.batch_size):
        batch = list(read(pictures[start : start + args.batch_size], truths, unreadable))
        found = find_cables([image for _, image, _ in batch])
        for (path, image, truth), mask in zip(batch, found, strict=True):
            write(args.output, path, image, mask)
            if truth is not None:
                results[path] = score(mask, Truth.of(truth))
        bar.update(min(args.batch_size, len(pictures) - start))
    bar.close()
    return results, unreadable


def find_pictures(path: Path) -> list[Path]:
    """The pictures to predict; raises FileNotFoundError or ValueError if there are none, or two of a stem."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"--input {path}: no such file or folder")
    pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not pictures:
        raise ValueError(f"--input {path}: no .png, .jpg or .jpeg file in it")
    stems = Counter(picture.stem for picture in pictures)
    doubles = [picture.name for picture in pictures if stems[picture.stem] > 1]
    if doubles:
        raise ValueError(f"--input {path}: {doubles[0]} and {doubles[1]} would give one mask")
    return pictures


def find_truths(folder: Path, pictures: list[Path]) -> dict[Path, Path]:
    """The true mask of each picture; raises FileNotFoundError naming the first picture without one."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--masks {folder}: no such folder")
    stems = {file.stem: file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES}
    for picture in pictures:
        if picture.stem not in stems:
            raise FileNotFoundError(f"--masks {folder}: no mask for {picture.name}")
    return {picture: stems[picture.stem] for picture in pictures}


def load(path: Path, device: torch.device, amp: torch.dtype | None) -> FindCables:
    """`segment` with the SAM that the checkpoint is of."""
    weights = checkpoint.load_weights(path)
    model_type = model.recognise(weights)
    if model_type is None:
        raise ValueError(f"{path} holds weights of none of {', '.join(model.VARIANTS)}")
    sam = model.VARIANTS[model_type].build()
    model.load_weights(sam, weights, model_type, path)
    model.place(sam, device, amp)
    return partial(segment, sam, model_type, amp)


def read(
    paths: list[Path], truths: dict[Path, Path], unreadable: list[str]
) -> Iterator[tuple[Path, np.ndarray, np.ndarray | None]]:
    """Path, image and truth (bool, or None) of what can be read; messages of the rest to `unreadable`."""
    for path in paths:
        try:
            check_size(path)
            image = read_image(path)
            truth = read_mask(truths[path]) if path in truths else None
            if truth is not None and truth.shape != image.shape[:2]:
                raise ValueError(f"{path}: is {image.shape[:2]} (h, w), but its mask is {truth.shape}")
        except ValueError as error:
            unreadable.append(str(error))
            continue
        yield path, image, truth


@torch.inference_mode()
def segment(
    sam: Sam, model_type: str, amp: torch.dtype | None, images_u8: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """Masks, bool (H, W) at each picture's own resolution."""
    if not images_u8:
        return
    frame = Frame(sam.image_encoder.img_size, model.mask_grid(sam))
    samples = [model_input(image, np.zeros(image.shape[:2], np.float32), frame) for image in images_u8]
    sizes = torch.stack([sample["size"] for sample in samples]).to(sam.device)
    images = torch.stack([sample["image"] for sample in samples]).to(sam.device)
    no_points = torch.zeros(len(images_u8), 0, 2, device=sam.device)
    no_labels = torch.zeros(len(images_u8), 0, dtype=torch.int64, device=sam.device)
    with model.autocast(sam.device, amp):
        logits, _ = model.decode(sam, model.encode(sam, images, sizes, model_type), no_points, no_labels)
    for image, size, low_res in zip(images_u8, sizes.tolist(), logits.float(), strict=True):
        yield (model.upscale(sam, low_res[None], tuple(size), image.shape[:2])[0, 0] > 0).cpu().numpy()


def write(output: Path, path: Path, image: np.ndarray, mask: np.ndarray) -> None:
    """Write a picture's mask and overlay, each whole or not at all."""
    masks, overlays = output / "masks", output / "overlays"
    for target, kind, array in (
        (masks / f"{path.stem}.png", "PNG", mask.astype(np.uint8) * 255),
        (overlays / f"{path.stem}.jpg", "JPEG", overlay(image, mask, PREDICTION_COLOUR)),
    ):
        save = partial(Image.fromarray(array).save, format=kind)
        checkpoint.write_atomically(target, save)


def print_scores(results: dict[Path, Scores]) -> None:
    """A table of the measures, the worst picture first, and their means."""
    names = [field.name for field in fields(Scores)]
    rows = [(path.stem, [getattr(scores, name) for name in names]) for path, scores in results.items()]
    rows.sort(key=lambda row: row[1][names.index("iou")])
    rows.append(("mean", np.mean([values for _, values in rows], axis=0)))
    width = max(len(stem) for stem, _ in rows)
    print("  ".join(["picture".ljust(width), *(f"{name:>7}" for name in names)]))
    for stem, values in rows:
        columns = (f"{value:{max(7, len(name))}.4f}" for name, value in zip(names, values, strict=True))
        print("  ".join([stem.ljust(width), *columns]))


def show_worst(output: Path, results: dict[Path, Scores], truths: dict[Path, Path]) -> None:
    """Write `worst.jpg`: image, truth and prediction of the pictures with the least IoU."""
    worst = sorted(results, key=lambda path: results[path].iou)[:WORST]
    found = (read_mask(output / "masks" / f"{path.stem}.png") for path in worst)
    panels = [panel(read_image(p), read_mask(truths[p]), mask) for p, mask in zip(worst, found, strict=True)]
    save = partial(Image.fromarray(sheet(panels)).save, format="JPEG")
    checkpoint.write_atomically(output / "worst.jpg", save)


if __name__ == "__main__":
    sys.exit(main())
