"""Rerun the README's comparison on real photos: what one trains on, how many photos, prompts, augmentation.

    python demo/results.py --data data

14 runs of 300 samples, 7 minutes each on 2 CPU cores by the 1.32 s that a sample takes, all of `finetune.py`
on configs that this writes to exp/results_configs/. A run that has ended is not run again. Prints the table
and draws demo/results.png.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = Path("exp/results_configs")
PHOTOS = 60  # in cables_plain, and samples of an epoch


@dataclass(frozen=True)
class Row:
    """A run; by default on augmented composites of all photos, without prompts."""

    name: str
    composites: bool = True
    augmented: bool = True
    photos: int = PHOTOS
    prompt: str = "none"
    cldice_weight: float = 0.0
    seeds: int = 1


ROWS = (
    Row("photos as they are", composites=False, augmented=False, seeds=3),
    Row("photos as they are, augmented", composites=False),
    Row("composites, not augmented", augmented=False),
    Row("composites", seeds=3),
    Row("composites of 10 photos", photos=10),
    Row("composites of 20 photos", photos=20),
    Row("composites of 40 photos", photos=40),
    Row("composites, a point", prompt="point"),
    Row("composites, a box", prompt="box"),
    Row("composites, clDice loss", cldice_weight=0.5),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the datasets of configs/cables.yaml"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "demo/results.png", help="the picture")
    parser.add_argument("--flags", default="--train encoder --epoch_num 5", help="of every run")
    names = [row.name for row in ROWS]
    parser.add_argument(
        "--rows", nargs="+", choices=names, default=names, metavar="ROW", help="; ".join(names)
    )
    parser.add_argument("--seeds", type=int, default=3, help="at most, of the rows that have several")
    args = parser.parse_args()
    runs = {row: range(min(row.seeds, args.seeds)) for row in ROWS if row.name in args.rows}
    for row, seeds in runs.items():
        for seed in seeds:
            run(row, seed, args.data.resolve(), args.flags.split())
    measures = {row: [read(row, seed) for seed in seeds] for row, seeds in runs.items()}
    print_table(measures)
    draw(measures, args.out)


def run_name(row: Row, seed: int) -> str:
    return f"results_{row.name.replace(', ', '_').replace(' ', '_')}_{seed}"


def run(row: Row, seed: int, data: Path, flags: list[str]) -> None:
    """Train a row, unless it has been."""
    name = run_name(row, seed)
    if Path("exp", name, "checkpoints/last.pth").exists():
        return
    command = [sys.executable, ROOT / "finetune.py", "--config", write_config(row, data)]
    command += ["--model_type", "lite_medsam", "--exp_name", name, "--seed", seed, "--prompt", row.prompt]
    command += ["--cldice_weight", row.cldice_weight, "--test_interval", 1_000_000, *flags]
    print(" ".join(map(str, command)), flush=True)
    subprocess.run([str(part) for part in command], check=True)


def write_config(row: Row, data: Path) -> Path:
    """The row's config, with a folder of links to so many photos, evenly chosen."""
    folder = CONFIGS.resolve() / f"plain_{row.photos}"
    for kind in ("imgs", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        files = sorted((data / "cables_plain" / kind).iterdir())
        for index in np.linspace(0, len(files) - 1, row.photos).round().astype(int):
            link = folder / kind / files[index].name
            if not link.exists():
                os.symlink(files[index], link)
    train = {"data_dir": str(folder), "w_aug": row.augmented, "percentage": PHOTOS / row.photos}
    if row.composites:
        train["bg_paths"] = [str(data / "backgrounds")]
    test = {"data_dir": str(data / "cables_cluttered")}
    path = CONFIGS / f"{run_name(row, 0)}.yaml"
    path.write_text(yaml.safe_dump({"dataset": {"train": [train], "test": test}}))
    return path


def read(row: Row, seed: int) -> dict[str, dict]:
    """What the run measured before training and at its end."""
    lines = Path("exp", run_name(row, seed), "metrics.jsonl").read_text().splitlines()
    return {"untuned": json.loads(lines[0]), "tuned": json.loads(lines[-1])}


def print_table(measures: dict[Row, list[dict]]) -> None:
    print("| trained on | untuned IoU | IoU | Dice | boundary IoU | clDice |\n|---|---|---|---|---|---|")
    for row, runs in measures.items():
        tuned = (
            " / ".join(f"{run['tuned'][name]:.3f}" for run in runs)
            for name in ("iou", "dice", "boundary_iou", "cldice")
        )
        print(f"| {row.name} | {runs[0]['untuned']['iou']:.3f} | {' | '.join(tuned)} |")


def draw(measures: dict[Row, list[dict]], out: Path) -> None:
    """IoU and clDice of every row as bars, the mean of its seeds, with the seeds as dots."""
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    places = np.arange(len(measures))
    for shift, name, label in ((-0.2, "iou", "IoU"), (0.2, "cldice", "clDice")):
        values = [[run["tuned"][name] for run in runs] for runs in measures.values()]
        axes.barh(places + shift, [np.mean(seeds) for seeds in values], 0.38, label=label)
        for place, seeds in zip(places, values, strict=True):
            if len(seeds) > 1:
                axes.plot(seeds, [place + shift] * len(seeds), "k.", markersize=4)
    axes.set_yticks(places, [row.name for row in measures])
    axes.invert_yaxis()
    axes.set(xlabel="mean of the test pictures", xlim=(0, 1))
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(out)


if __name__ == "__main__":
    main()
