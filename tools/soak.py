"""Train a tiny SAM for a long time, and print memory and open files meanwhile (Linux only).

python tools/soak.py --iterations 4000
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import build_tiny, write_backgrounds, write_dataset

import checkpoint

ITERATIONS_PER_EPOCH = 10  # 40 images, batch size 4


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a tiny SAM for a long time, and print memory and open files meanwhile."
    )
    parser.add_argument("--iterations", type=int, default=4000, help="iterations to train")
    parser.add_argument("--seconds", type=float, default=15, help="seconds between lines")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code of the training."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        epochs = max(1, args.iterations // ITERATIONS_PER_EPOCH)
        return watch(train_command(epochs), folder, args.seconds)


def write_inputs(folder: Path) -> None:
    """Write datasets, `config.yaml` and the weights `tiny.pth`."""
    write_dataset(folder / "cables", 40)
    write_dataset(folder / "test", 4, seed=1)
    write_backgrounds(folder / "backgrounds", 10)
    train = {"data_dir": "cables", "bg_paths": ["backgrounds"], "w_aug": True}
    document = {"dataset": {"train": [train], "test": {"data_dir": "test"}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    torch.manual_seed(0)
    checkpoint.save_weights(build_tiny().state_dict(), folder / "tiny.pth")


def train_command(epochs: int) -> list[str]:
    """Return a training command that tests and saves often."""
    flags: dict[str, object] = {
        "config": "config.yaml",
        "exp_name": "soak",
        "model_type": "tiny",
        "checkpoint": "tiny.pth",
        "device": "cpu",
        "amp": "off",
        "epoch_num": epochs,
        "test_interval": 50,
        "resume_interval": 0.02,
        "save_interval": 5,
        "keep_last": 3,
        "num_workers": 1,
        "embedding_reuse": 2,
    }
    command = [sys.executable, str(ROOT / "tests/tiny_run.py")]
    return command + [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def watch(command: list[str], folder: Path, seconds: float) -> int:
    """Run the command, and print a line about it and its children every `seconds`; returns its exit code."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        print("iteration  resident MB  open files  files in exp/")
        while process.poll() is None:
            time.sleep(seconds)
            print_line(process.pid, folder)
    if process.returncode:
        print((folder / "log").read_text()[-2000:], file=sys.stderr)
    return process.returncode


def print_line(pid: int, folder: Path) -> None:
    """Print iteration, memory and files of a process and its children, unless it has ended."""
    iterations = re.findall(r"(\d+)/\d+ \[", (folder / "log").read_text()[-2000:])
    processes = [pid, *child_processes(pid)]
    memory = sum(resident_kb(process) for process in processes)
    descriptors = sum(count_descriptors(process) for process in processes)
    files = sum(1 for path in (folder / "exp").rglob("*") if path.is_file())
    if memory:
        iteration = iterations[-1] if iterations else "-"
        print(f"{iteration:>9}  {memory / 1e3:11.0f}  {descriptors:10}  {files:13}", flush=True)


def child_processes(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # the process has ended
        return []


def resident_kb(pid: int) -> int:
    """Resident memory of a process in kB; 0 if it has ended."""
    try:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


def count_descriptors(pid: int) -> int:
    """Number of open files of a process; 0 if it has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
