"""Everything global, set once: allocator, warnings, device and precision, processes, signals.

Several processes, started by torchrun, train as one. Gradients are sums over samples, so the sum over all
processes is the gradient of the whole batch, whatever each one's share of it; a share may be empty.
`DistributedDataParallel` would average instead, and needs every process in every backward pass.
"""

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.process import BaseProcess
from signal import SIGINT, SIGTERM
from types import FrameType
from typing import Any

import cv2
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from base.errors import UserError


def init() -> None:
    """Set what is global to the process; every command calls this first."""
    warnings.formatwarning = lambda message, *rest, **options: f"warning: {message}\n"
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged metadata; they name no file
    Image.MAX_IMAGE_PIXELS = None  # imaging.files checks sizes itself, against --max_pixels
    _keep_freed_memory()
    _data_workers.clear()


def init_data_worker(worker_id: int) -> None:
    """The same for a process that prepares data; the main process ends the run."""
    init()
    signal.signal(SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal
    signal.signal(SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)  # one process per core is parallel enough


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones.

    By default it returns large blocks to the kernel at once, which must then map and clear the pages of
    every activation again. LiteMedSAM's encoder takes 1.5 times as long that way on a CPU.
    """
    trim_threshold, mmap_threshold = -1, -3  # constants of malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library or another system
        return
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)


# --- Device and precision ---------------------------------------------------------------------


def pick_device(choice: str) -> torch.device:
    """The device asked for; "auto" takes the first available of cuda, mps, cpu. Raises UserError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if choice == "auto":
        choice = next(name for name, is_available in available.items() if is_available)
    if not available[choice]:
        raise UserError(f"--device {choice}: PyTorch finds no such device on this machine; try --device auto")
    return torch.device(choice)


def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The low precision that `--amp` asks for, or None for float32.

    "auto" takes bfloat16 where the hardware computes in it (CUDA 8.0+, CPUs with AVX512-BF16 or AMX),
    and float16 on older CUDA devices.
    """
    if choice != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[choice]
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # which one, depends on the version
        if any(getattr(torch.cpu, check, lambda: False)() for check in checks):
            return torch.bfloat16
    return None


def autocast(device: torch.device, low_precision: torch.dtype | None) -> AbstractContextManager:
    """A context that computes in `low_precision`, or in float32 if that is None."""
    return torch.autocast(device.type, low_precision) if low_precision else nullcontext()


# --- Processes --------------------------------------------------------------------------------


def rank() -> int:
    """Number of this process, from 0. Only process 0 prints and writes."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def join_process_group(device: torch.device) -> torch.device:
    """Connect to the other processes, if there are any; returns the device of this process."""
    if device.type == "cuda" and world_size() > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    all_reduce_max([0])


def all_reduce_sum(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, in place, by its sum over all processes."""
    if world_size() > 1:
        for pending in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            pending.wait()


def all_reduce_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes; a missing gradient counts as 0."""
    if world_size() > 1:
        summed = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            summed.append(parameter.grad)
        all_reduce_sum(summed)


def all_reduce_max(values: list[int]) -> list[int]:
    """The maximum over all processes, value by value."""
    if world_size() == 1:
        return values
    agreed = torch.tensor(values)  # on the CPU, so that nothing waits for the device
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return agreed.tolist()


def gather(items: list[Any]) -> list[Any]:
    """The items of all processes, those of process 0 first."""
    if world_size() == 1:
        return items
    shares: list[Any] = [None] * world_size()
    dist.all_gather_object(shares, items)
    return [item for share in shares for item in share]


# --- Failures ---------------------------------------------------------------------------------

_data_workers: set[BaseProcess] = set()


def watch_data_workers(processes: Iterable[BaseProcess]) -> None:
    """Remember the processes that prepare data, for `explain`."""
    _data_workers.update(processes)


def explain(error: Exception, needs_less_memory: str) -> str | None:
    """What to tell the user of an error that is no bug, or None for a bug.

    It is no bug if it is a UserError, if memory ran out, or if a data worker died. For the last two, PyTorch
    raises a plain RuntimeError on a CPU; for a dead worker at any line of the main process. A dead worker
    shows in its exit code. For the CPU's memory there is no sign but the allocator's name in the text.
    `needs_less_memory` names the flags that help.
    """
    if isinstance(error, UserError):
        return str(error)
    first_line = str(error).strip().partition("\n")[0]
    is_cpu_memory = type(error) is RuntimeError and "DefaultCPUAllocator" in first_line
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or is_cpu_memory:
        return f"out of memory ({first_line or type(error).__name__}); {needs_less_memory}"
    if isinstance(error, RuntimeError) and any(process.exitcode for process in _data_workers):
        return (
            f"a process that prepares data died, possibly out of memory ({first_line}); "
            "fewer --num_workers need less memory"
        )
    return None


# --- Signals ----------------------------------------------------------------------------------


class StopRequest:
    """A context that notes the first SIGINT or SIGTERM, so that the run ends after its iteration.

    A second signal raises KeyboardInterrupt at once.
    """

    signal: int | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in (SIGINT, SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print(f"\n{signal.Signals(number).name}: the run ends after this iteration", file=sys.stderr)
