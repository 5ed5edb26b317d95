"""Look at the data before training: contact sheets of what the model will get, sizes, widths, duplicates."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from base import atomic
from dataset import DatasetIndex, TestSet, TrainSet
from imaging.files import format_list, read_image, read_mask
from imaging.geometry import InputSpec
from imaging.metrics import GroundTruth
from imaging.visualize import contact_sheet, draw_points, outline

ENLARGED = 400  # pixels that a sample is at least enlarged to before it is drawn on, as on the sheet
SAMPLES = 12  # on a contact sheet
PAIRS_MEASURED = 60  # of a dataset, evenly chosen: widths take a tenth of a second a photo
THINNEST = 2.0  # cells of the mask grid; what is thinner has no inside on it
# Correlation of two photos, 32 x 32 gray, above which they are taken for the same scene.
DUPLICATE = 0.98


def write_preview(
    train: list[DatasetIndex],
    test: DatasetIndex | None,
    *,
    spec: InputSpec,
    prompt: str,
    seed: int,
    folder: Path,
) -> None:
    """Write contact sheets to `folder`, and print what is to be known of each dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"spec": spec, "prompt": prompt, "seed": seed}
    for number, source in enumerate([*train, *([test] if test else [])]):
        role = f"train {number}" if number < len(train) else "test"
        if number < len(train):
            samples = TrainSet([replace_percentage(source)], **options)
            keys = samples.epoch(0)[:SAMPLES]
        else:
            samples = TestSet(source, **options)
            keys = range(min(SAMPLES, len(samples)))
        path = folder / f"{role.replace(' ', '_')}.jpg"
        picture = Image.fromarray(contact_sheet([show(samples[key]) for key in keys]))
        atomic.write_atomically(path, lambda file, picture=picture: picture.save(file, "JPEG"))
        print("\n".join([f"{role}  {source.config.data_dir}", *describe(source, spec), f"  see {path}"]))
    if test and (pairs := near_duplicates(train, test)):
        print(f"warning: photos to test on look like photos to train on:\n  {format_list(pairs)}")


def replace_percentage(source: DatasetIndex) -> DatasetIndex:
    """The source with all of its pairs in an epoch, for there to be enough to show."""
    return replace(source, config=source.config.model_copy(update={"percentage": 1.0}))


def show(sample: dict) -> np.ndarray:
    """A sample as the model gets it, with the outline of its target and its prompt: RGB uint8 (h, w, 3).

    It is enlarged, so that an outline does not cover a thin cable.
    """
    image = sample["image"].numpy()
    times = -(-ENLARGED // len(image))
    side = times * len(image)
    height, width = (times * length for length in sample["size"].tolist())
    large = cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC)
    target = cv2.resize(sample["target"][0].numpy(), (side, side), interpolation=cv2.INTER_LINEAR)
    large = outline(large, target > 127)[:height, :width]
    return draw_points(large, sample["points"].numpy() * times, sample["labels"].numpy())


def describe(source: DatasetIndex, spec: InputSpec) -> list[str]:
    """Lines on a dataset: pairs, sizes, share of foreground, widths on the model's mask grid, warnings."""
    chosen = np.unique(np.linspace(0, len(source.pairs) - 1, PAIRS_MEASURED).astype(int))
    shares, widths = [], []
    for pair in (source.pairs[index] for index in chosen):
        mask = read_mask(pair.mask_path)
        shares.append(mask.mean())
        cells = spec.mask_grid / max(mask.shape)  # to a pixel
        widths.append(GroundTruth.from_mask(mask).widths * cells)
    sizes = sorted({source.facts[pair.image_path].size for pair in source.pairs})
    shown = ", ".join(f"{height} x {width}" for height, width in sizes[:3]) + ", ..." * (len(sizes) > 3)
    lines = [
        f"  {len(source.pairs)} pairs of {shown} (h x w), {len(source.backgrounds)} backgrounds",
        f"  foreground {np.mean(shares):.1%} of the pixels",
    ]
    empty = [
        str(source.pairs[index].mask_path) for index, share in zip(chosen, shares, strict=True) if not share
    ]
    if empty:
        lines.append(f"  {len(empty)} of {len(chosen)} masks looked at are empty:\n  {format_list(empty)}")
    widths = np.concatenate(widths)
    if len(widths):
        median, low = np.quantile(widths, [0.5, 0.05])
        lines.append(
            f"  cables are {median:.1f} cells of the mask grid wide (median; 5th percentile {low:.1f})"
        )
        thin = np.mean(widths < THINNEST)
        if thin >= 0.05:
            lines.append(
                f"  warning: {thin:.0%} of their length is thinner than {THINNEST:g} cells, which the model "
                "can hardly draw; crop the photos, or take a model of larger input"
            )
    return lines


def near_duplicates(train: list[DatasetIndex], test: DatasetIndex) -> list[str]:
    """Pairs (test = train) of photos that are nearly the same picture."""
    paths = list(dict.fromkeys(pair.image_path for source in train for pair in source.pairs))
    ours, theirs = thumbnails([pair.image_path for pair in test.pairs]), thumbnails(paths)
    alike = ours @ theirs.T  # (tests, trained)
    return [
        f"{pair.image_path} = {paths[index]}"
        for pair, row in zip(test.pairs, alike, strict=True)
        if row[index := int(row.argmax())] > DUPLICATE
    ]


def thumbnails(paths: list[Path]) -> np.ndarray:
    """Photos as vectors (n, 1024) whose products are correlations."""
    vectors = []
    for path in paths:
        gray = cv2.cvtColor(read_image(path), cv2.COLOR_RGB2GRAY)
        vector = cv2.resize(gray, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
        vector -= vector.mean()
        vectors.append(vector / max(np.linalg.norm(vector), 1e-6))
    return np.array(vectors)
