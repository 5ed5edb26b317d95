"""Plot the test IoU of several runs over time.

python tools/plot_curves.py exp/one exp/another --out curves.png
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plot the test IoU of several runs over time.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder exp/NAME of a run")
    parser.add_argument("--out", type=Path, required=True, help="image file to write")
    args = parser.parse_args(argv)
    for run in args.runs:
        if not any(run.glob("events.out.tfevents.*")):
            parser.error(f"argument RUN: {run} contains no TensorBoard curves; expected a folder exp/NAME")
    return args


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
