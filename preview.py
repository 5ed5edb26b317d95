"""Look at the data before training: contact sheets of the samples, sizes, cable widths, duplicates."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from base.errors import UserError
from dataset import TestSet, TrainSet
from dataset_index import DatasetIndex
from imaging.files import first_few, format_list, read_image
from imaging.geometry import InputSpec
from imaging.masks import read_mask
from imaging.media import write_image
from imaging.metrics import GroundTruth
from imaging.pairing import Pair
from imaging.visualize import contact_sheet, darkened, draw_points, outline

MIN_SHOWN_SIDE = 400  # pixels to which a sample is enlarged at least, as on the contact sheet
SHEET_NAME = re.compile(r"(train_(0|[1-9][0-9]*)|test)\.jpg")  # what `preview_dataset` writes
N_SAMPLES = 12  # samples on a contact sheet
N_MEASURED = 60  # masks of a dataset that are measured: each takes a tenth of a second
MIN_WIDTH = 2.0  # pixels of the model's mask; a thinner cable has no interior there
MAX_THIN_SHARE = 0.05  # of the length of the cables, above which a warning is printed

# Two images are near duplicates if their thumbnails correlate by more than this.
DUPLICATE_CORRELATION = 0.98
THUMBNAIL_SIDE = 32  # pixels


def write_preview(
    train: Sequence[DatasetIndex],
    test: DatasetIndex | None,
    *,
    spec: InputSpec,
    prompt: str,
    seed: int,
    folder: Path,
) -> None:
    """Write a contact sheet of each dataset to `folder`, and print its statistics and warnings.

    Args:
        spec: the sizes of the model to be trained.
        prompt: one of PROMPT_KINDS; prompts are drawn on the samples.
        seed: the seed of the run.

    Raises UserError if `folder` cannot be written.
    """
    start_folder(folder)
    for number, index in enumerate(train):
        train_set = TrainSet([with_all_pairs(index)], spec=spec, prompt=prompt, seed=seed)
        train_samples = (train_set[key] for key in train_set.epoch(0)[:N_SAMPLES])
        preview_dataset(f"train {number}", index, train_samples, spec, folder)
    if test is None:
        return
    test_set = TestSet(test, spec=spec, prompt=prompt, seed=seed)
    test_samples = (test_set[number] for number in range(min(N_SAMPLES, len(test_set))))
    preview_dataset("test", test, test_samples, spec, folder)
    train_infos = {pair.image_path: index.infos[pair.image_path] for index in train for pair in index.pairs}
    digests = {info.digest for info in train_infos.values()}
    test_paths = [pair.image_path for pair in test.pairs]
    test_paths = [path for path in test_paths if test.infos[path].digest not in digests]  # see `find_leaks`
    duplicates = find_near_duplicates(test_paths, list(train_infos)) if test_paths else []
    if duplicates:
        lines = [f"{test_path} = {train_path}" for test_path, train_path in duplicates]
        print(f"warning: test images look like training images:\n  {format_list(lines)}")


def start_folder(folder: Path) -> None:
    """Make the folder of a preview, and remove the contact sheets of an earlier one. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if SHEET_NAME.fullmatch(path.name):
                path.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be prepared ({error})") from error


def preview_dataset(
    role: str, index: DatasetIndex, samples: Iterable[Mapping[str, Any]], spec: InputSpec, folder: Path
) -> None:
    """Write the contact sheet of a dataset and print its statistics; `role` names both."""
    sheet_path = folder / f"{role.replace(' ', '_')}.jpg"
    write_image(
        sheet_path, contact_sheet([render_sample(sample) for sample in samples], columns=2, width=800)
    )
    chosen = np.unique(np.linspace(0, len(index.pairs) - 1, N_MEASURED).astype(int))
    stats = measure_masks([index.pairs[number] for number in chosen], spec.mask_grid)
    sizes = sorted({index.infos[pair.image_path].size for pair in index.pairs})
    size_text = first_few([f"{height} x {width}" for height, width in sizes])
    print(f"{role}  {index.config.data_dir}")
    print(f"  {len(index.pairs)} pairs of {size_text} (h x w), {len(index.backgrounds)} backgrounds")
    print(f"  foreground {index.foreground:.2%} of the pixels, mean of all masks")
    print("\n".join(f"  {line}" for line in [*describe(stats, spec.mask_grid), *index.notes()]))
    print(f"  see {sheet_path}")


def with_all_pairs(index: DatasetIndex) -> DatasetIndex:
    """A copy of a dataset index whose epochs hold every pair once."""
    return replace(index, config=index.config.model_copy(update={"percentage": 1.0}))


def render_sample(sample: Mapping[str, Any]) -> np.ndarray:
    """Show a sample beside its target and its prompt on dark gray: RGB uint8 (h, 2 w, 3).

    The image is enlarged first: otherwise the outline of the target would cover thin cables.
    """
    image = sample["image"].numpy()
    factor = -(-MIN_SHOWN_SIDE // len(image))
    side = factor * len(image)
    height, width = (factor * length for length in sample["size"].tolist())
    enlarged = cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC)
    target = cv2.resize(sample["target"][0].numpy(), (side, side), interpolation=cv2.INTER_LINEAR)
    outlined = outline(darkened(enlarged), target > 127, thickness=2)
    marked = draw_points(outlined, sample["points"].numpy() * factor, sample["labels"].numpy())
    return np.hstack([enlarged[:height, :width], marked[:height, :width]])


# --- Statistics -------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskStats:
    """Statistics of n masks with m centerline pixels.

    shares: float (n,), fraction of foreground pixels in each mask.
    widths: float (m,), width of the cable at each centerline pixel, in pixels of the model's mask.
    empty_paths: the masks without foreground.
    """

    shares: np.ndarray
    widths: np.ndarray
    empty_paths: list[Path]


def measure_masks(pairs: Sequence[Pair], mask_grid: int) -> MaskStats:
    """Read and measure at least one mask; `mask_grid` is the side of the model's mask in pixels."""
    shares, widths = [], []
    for pair in pairs:
        mask = read_mask(pair.mask_path, pair.mask_values)
        shares.append(mask.mean())
        scale = mask_grid / max(mask.shape)
        widths.append(GroundTruth.from_mask(mask).widths * scale)
    empty_paths = [pair.mask_path for pair, share in zip(pairs, shares, strict=True) if share == 0]
    return MaskStats(np.array(shares), np.concatenate(widths), empty_paths)


def describe(stats: MaskStats, mask_grid: int) -> list[str]:
    """Describe masks in lines of text: empty masks, cable widths, a warning of thin cables."""
    lines = []
    if stats.empty_paths:
        empty = format_list([str(path) for path in stats.empty_paths])
        lines.append(f"{len(stats.empty_paths)} of {len(stats.shares)} masks checked are empty:\n  {empty}")
    if len(stats.widths) == 0:
        return lines
    median, low = np.quantile(stats.widths, [0.5, 0.05])
    lines.append(
        f"the model draws masks of {mask_grid} x {mask_grid} pixels; cables are {median:.1f} of these pixels "
        f"wide (median; 5th percentile {low:.1f})"
    )
    thin_share = np.mean(stats.widths < MIN_WIDTH)
    if thin_share >= MAX_THIN_SHARE:
        lines.append(
            f"warning: {thin_share:.0%} of their length is thinner than {MIN_WIDTH:g} of these pixels, too "
            "thin to be drawn well; crop the images, or choose a model with a larger input"
        )
    return lines


# --- Duplicates -------------------------------------------------------------------------------


def find_near_duplicates(test_paths: Sequence[Path], train_paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Find the pairs (test image, training image) that look nearly the same; one pair per test image."""
    correlations = thumbnails(test_paths) @ thumbnails(train_paths).T  # (n_test, n_train)
    best = correlations.argmax(axis=1)
    return [
        (test_path, train_paths[number])
        for test_path, number, row in zip(test_paths, best, correlations, strict=True)
        if row[number] > DUPLICATE_CORRELATION
    ]


def thumbnails(paths: Sequence[Path]) -> np.ndarray:
    """Gray thumbnails as float32 (n, 1024), normalized: the dot product of two rows is their correlation."""
    vectors = []
    for path in paths:
        gray = cv2.cvtColor(read_image(path), cv2.COLOR_RGB2GRAY)
        small = cv2.resize(gray, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA)
        vector = small.astype(np.float32).ravel()
        vector -= vector.mean()
        norm = float(np.linalg.norm(vector))
        vectors.append(vector / max(norm, 1e-6))  # a uniform image correlates with nothing
    return np.array(vectors)
