"""Plot the test IoU of several runs over time.

python tools/plot_curves.py exp/one exp/another --out curves.png
"""

import argparse
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plot the test IoU of several runs over time.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder exp/NAME of a run")
    parser.add_argument("--out", type=Path, required=True, help="image file to write")
    args = parser.parse_args(argv)
    for run in args.runs:
        if not any(run.glob("events.out.tfevents.*")):
            parser.error(f"argument RUN: {run} contains no TensorBoard curves; expected a folder exp/NAME")
    if fault := plot_fault(args.out):
        parser.error(f"argument --out: {fault}")
    return args


def plot_fault(path: Path) -> str | None:
    """Why a plot cannot be written to `path`; None if it can. Only a plot of Matplotlib may be replaced."""
    if not path.absolute().parent.is_dir():
        return f"there is no folder {path.parent}; create it first"
    formats = plt.figure().canvas.get_supported_filetypes()
    plt.close()
    if path.suffix[1:].lower() not in formats:
        return f"{path} is no image file; expected a name that ends in .png, .pdf or .svg"
    if os.path.lexists(path) and not is_plot(path):
        return f"{path} exists and is no PNG file of Matplotlib; choose a new name, or remove it first"
    return None


def is_plot(path: Path) -> bool:
    """Whether this is a PNG file that Matplotlib has written, which its metadata say."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return str(image.info.get("Software", "")).startswith("Matplotlib")
    except OSError:
        return False


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 if a run has no test."""
    args = parse_args(argv)
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    for run in args.runs:
        curves = EventAccumulator(str(run)).Reload()
        if "test/iou" not in curves.Tags()["scalars"]:
            print(f"error: {run} contains no test IoU; expected a run with a test dataset", file=sys.stderr)
            return 2
        tests = curves.Scalars("test/iou")
        minutes = [(test.wall_time - tests[0].wall_time) / 60 for test in tests]
        axes.plot(minutes, [test.value for test in tests], marker=".", label=run.name)
    axes.set(xlabel="minutes", ylabel="test IoU", ylim=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out)
    plt.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
