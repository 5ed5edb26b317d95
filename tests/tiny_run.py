"""finetune.py's command line in a process of its own, which knows the tiny SAM as `--model_type tiny`.

In the environment, KILL_IN=n has SIGKILL end it in the n-th iteration that it computes (or of several
processes the last), and FULL_IN=n the disk be full from there on, in so far as no file can grow.
"""

import os
import resource
import signal
import sys
from itertools import count

from conftest import TINY

import finetune
import runtime
from sam import variants

variants.VARIANTS["tiny"] = TINY
iterations = count(1)
dice_loss = finetune.dice_loss


def dice_loss_or_fate(*args):
    number = next(iterations)
    last = runtime.rank() == runtime.world_size() - 1
    if last and number == int(os.environ.get("KILL_IN", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    if number == int(os.environ.get("FULL_IN", 0)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    return dice_loss(*args)


finetune.dice_loss = dice_loss_or_fate
sys.exit(finetune.main())
