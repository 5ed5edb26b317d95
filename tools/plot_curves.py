"""Plot the test IoU of several runs over the time they took, as one picture.

python tools/plot_curves.py exp/one exp/another --out curves.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders exp/NAME")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    for run in args.runs:
        tests = EventAccumulator(str(run)).Reload().Scalars("test/iou")
        minutes = [(test.wall_time - tests[0].wall_time) / 60 for test in tests]
        axes.plot(minutes, [test.value for test in tests], marker=".", label=run.name)
    axes.set(xlabel="minutes", ylabel="test IoU", ylim=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
