"""Train the tiny SAM for long and print memory and open files on the way. On Linux; in CI a short one.

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=15, help="between lines")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "cables", 40)
        write_dataset(folder / "test", 4, seed=1)
        write_backgrounds(folder / "backgrounds", 10)
        train = {"data_dir": "cables", "bg_paths": ["backgrounds"], "w_aug": True}
        document = {"dataset": {"train": [train], "test": {"data_dir": "test"}}}
        (folder / "config.yaml").write_text(yaml.safe_dump(document))
        torch.manual_seed(0)
        checkpoint.save_weights(build_tiny().state_dict(), folder / "tiny.pth")
        command = [sys.executable, ROOT / "tests/tiny_run.py", "-c", "config.yaml", "-n", "soak"]
        command += ["--model_type", "tiny", "--checkpoint", "tiny.pth", "--device", "cpu", "--amp", "off"]
        command += ["-e", args.iterations // 10, "--test_interval", 50, "--resume_interval", 0.02]
        command += ["--save_interval", 5, "--keep_last", 3, "--num_workers", 1, "--embedding_reuse", 2]
        watch([str(part) for part in command], folder, args.seconds)


def watch(command: list[str], folder: Path, seconds: float) -> None:
    """Run the command; print a line about it and its children every so many seconds."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        print("iteration  resident MB  open files  files in exp/")
        while process.poll() is None:
            time.sleep(seconds)
            done = re.findall(r"(\d+)/\d+ \[", (folder / "log").read_text()[-2000:])
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            processes = [str(process.pid), *(children.read_text().split() if children.exists() else [])]
            files = sum(1 for path in (folder / "exp").rglob("*") if path.is_file())
            memory, opened = (sum(measure(pid) for pid in processes) for measure in (resident, descriptors))
            if memory:
                print(
                    f"{done[-1] if done else '-':>9}  {memory / 1e3:11.0f}  {opened:10}  {files:13}",
                    flush=True,
                )
    sys.exit(process.returncode)


def resident(pid: str) -> int:
    """Resident memory of a process in kB; 0 once it has ended."""
    try:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


def descriptors(pid: str) -> int:
    """Open files of a process; 0 once it has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


if __name__ == "__main__":
    main()
