"""finetune.py's command line in a process of its own, which knows the tiny SAM as `--model_type tiny`.

Environment variables inject faults at the one seam of the training loop. KILL_IN=n ends the process (of
several, the last one) with SIGKILL when it takes its n-th batch. GROUP_IN=n sends SIGTERM to the process
group, data workers included. FULL_IN=n makes the disk look full from then on: no file can grow.
"""

import os
import resource
import signal
import sys

from conftest import TINY

import finetune
import runtime
from sam import variants


def batches_or_fate(*args, **options):
    is_last_process = runtime.rank() == runtime.world_size() - 1
    for number, batch in enumerate(training_batches(*args, **options), 1):
        if is_last_process and number == int(os.environ.get("KILL_IN", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        if number == int(os.environ.get("GROUP_IN", 0)):
            os.killpg(os.getpgrp(), signal.SIGTERM)
        if number == int(os.environ.get("FULL_IN", 0)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        yield batch


training_batches = finetune.training_batches
finetune.training_batches = batches_or_fate
variants.VARIANTS["tiny"] = TINY
sys.exit(finetune.main())
