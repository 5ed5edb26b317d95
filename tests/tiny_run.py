"""finetune.py's command line in a process of its own, which knows the tiny SAM as `--model_type tiny`.

Environment variables inject faults at the one seam of the training loop. KILL_IN=n ends the process (of
several, the last one) with SIGKILL when it takes its n-th batch. GROUP_IN=n sends SIGTERM to the process
group, data workers included. FULL_IN=n makes the disk look full from then on: no file can grow.
"""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import TINY
from fake_cuda_check import free_port

import finetune
import runtime
from sam import variants

# `run_forked` forks from a process that has imported these packages, which takes seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["segment_anything", "skimage.morphology", "torch.utils.tensorboard"])

training_batches = finetune.training_batches


def batches_with_faults(*args, **options):
    is_last_process = runtime.rank() == runtime.world_size() - 1
    for number, batch in enumerate(training_batches(*args, **options), 1):
        if is_last_process and number == int(os.environ.get("KILL_IN", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        if number == int(os.environ.get("GROUP_IN", 0)):
            os.killpg(os.getpgrp(), signal.SIGTERM)
        if number == int(os.environ.get("FULL_IN", 0)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        yield batch


def main(argv: list[str] | None = None) -> int:
    finetune.training_batches = batches_with_faults
    variants.VARIANTS["tiny"] = TINY
    return finetune.main(argv)


def run_forked(*argv, processes=1, **environment) -> subprocess.CompletedProcess:
    """Run `main` in new processes, of which several train together as under torchrun.

    Returns what all of them print, and the exit code of the first one that fails. What Python does at the end
    of a script is left out: a test of that starts this file as a script.
    """
    words = [str(part) for part in argv]
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    if processes > 1:
        variables |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as name:
        outputs = [Path(name, str(rank)) for rank in range(processes)]
        children = []
        for rank, output in enumerate(outputs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            children.append(FORKS.Process(target=_child, args=(words, Path.cwd(), variables | own, output)))
            children[-1].start()
        for child in children:
            child.join(timeout=300)
            child.kill()
            child.join()
        printed = {
            stream: "".join(Path(f"{output}.{stream}").read_text() for output in outputs)
            for stream in ("stdout", "stderr")
        }
    code = next((child.exitcode for child in children if child.exitcode), 0)
    return subprocess.CompletedProcess(words, code, **printed)


def _child(words: list[str], folder: Path, variables: dict[str, str], output: Path) -> None:
    os.setsid()  # a process group of its own
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        with Path(f"{output}.{stream}").open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.exit(main(words))


if __name__ == "__main__":
    sys.exit(main())
