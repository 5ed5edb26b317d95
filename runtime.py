"""Everything global, set once: allocator, warnings, device and precision, processes, signals.

Several processes, started by torchrun, train together. Each process sums the gradients of its samples, so the
sum over all processes is the gradient of the whole batch, also if the share of a process is empty.
`DistributedDataParallel` averages instead, and needs every process in every backward pass.
"""

import ctypes
import io
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from multiprocessing.process import BaseProcess
from signal import SIGINT, SIGTERM
from types import FrameType
from typing import Any, TextIO, TypeVar

import cv2
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from base.errors import UserError

Result = TypeVar("Result")


def init() -> None:
    """Set what is global to the process; every command calls this first."""
    warnings.formatwarning = lambda message, *rest, **options: f"warning: {message}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may lack letters of a file name
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged metadata; they name no file
    Image.MAX_IMAGE_PIXELS = None  # imaging.files checks sizes itself, against --max_pixels
    keep_freed_memory()
    _data_workers.clear()


def init_data_worker(worker_id: int) -> None:
    """Call `init` in a data worker, and ignore signals there: the main process decides when the run ends."""
    init()
    for number in STOP_SIGNALS:  # they may reach the whole process group
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)  # one process per core is parallel enough


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, of any thread.

    By default, glibc returns large blocks to the kernel at once. The kernel must then map and clear new pages
    for every activation, and LiteMedSAM's encoder takes 1.5 times as long on a CPU. By default, each
    thread also has a heap of its own; together they would keep much more memory.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # constants of malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library or another system
        return
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)
    libc.mallopt(arena_max, 1)


# --- Device and precision ---------------------------------------------------------------------


def pick_device(choice: str) -> torch.device:
    """The device asked for, such as "cuda" or "cuda:1"; "auto" takes the first available of cuda, mps, cpu.

    Raises UserError if there is none.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if choice == "auto":
        choice = next(name for name, is_available in available.items() if is_available)
    if not available.get(choice.partition(":")[0]):
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
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # one exists, by version
        if any(getattr(torch.cpu, check, lambda: False)() for check in checks):
            return torch.bfloat16
    return None


def allow_tf32(low_precision: torch.dtype | None, device: torch.device) -> None:
    """Let float32 matrix products on CUDA round their inputs to TensorFloat32, if training is in float32.

    `torch.set_float32_matmul_precision("high")` does the same, but also reaches products on some CPUs.
    Convolutions on CUDA use TensorFloat32 by PyTorch's default.
    """
    torch.backends.cuda.matmul.allow_tf32 = low_precision is None and device.type == "cuda"


def autocast(device: torch.device, low_precision: torch.dtype | None) -> AbstractContextManager[Any]:
    """A context that computes in `low_precision`, or in float32 if that is None."""
    return torch.autocast(device.type, low_precision) if low_precision else nullcontext()


# `--compile auto` compiles if a CUDA run encodes at least this many images. This is an estimate: compiling
# takes a minute, which an encoder of 150 images/s that gets 25 % faster saves over 40,000 images.
MIN_IMAGES_TO_COMPILE = 40_000


def should_compile(choice: str, device: torch.device, images_to_encode: int) -> bool:
    """What `--compile` says. Raises UserError if it is "on" and there is no C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")
    if choice == "on" and not compiler:
        raise UserError("--compile on: needs a C++ compiler (g++ or clang++), and none is found")
    is_long_on_cuda = (
        device.type == "cuda" and images_to_encode >= MIN_IMAGES_TO_COMPILE and compiler is not None
    )
    return choice == "on" or (choice == "auto" and is_long_on_cuda)


# --- Processes --------------------------------------------------------------------------------


def rank() -> int:
    """Number of this process, from 0. Only process 0 prints and writes."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """How many of these processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def ranks_on_machine() -> range:
    """Numbers of the processes on this machine, as torchrun counts them; without it, this process alone."""
    first = rank() - int(os.environ.get("LOCAL_RANK", 0)) if "LOCAL_WORLD_SIZE" in os.environ else rank()
    return range(first, first + local_world_size())


def is_main() -> bool:
    return rank() == 0


def is_first_on_machine() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


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
    """Replace each tensor, in place, by its sum over all processes; in one message for all tensors."""
    tensors = list(tensors)
    if world_size() > 1 and tensors:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


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


LONG_WAIT = timedelta(days=7)  # the timeout of a process group is 10 or 30 minutes


def from_main(make: Callable[[], Result]) -> Result:
    """Call `make` in process 0, and return its result in every process. It may take up to LONG_WAIT.

    If `make` is interrupted, or raises an error that the user can correct, every process raises the same.
    """
    if not dist.is_initialized():
        return make()
    patient = dist.new_group(backend="gloo", timeout=LONG_WAIT)
    assert isinstance(patient, dist.ProcessGroup)  # every process is a member
    made: list[Any] = [None]
    if is_main():
        try:
            made = [make()]
        except (UserError, MemoryError, KeyboardInterrupt) as error:
            made = [error]
    dist.broadcast_object_list(made, src=0, group=patient)
    dist.destroy_process_group(patient)
    if isinstance(made[0], BaseException):
        raise made[0]
    return made[0]


# --- Failures ---------------------------------------------------------------------------------

_data_workers: set[BaseProcess] = set()


def watch_data_workers(processes: Iterable[BaseProcess]) -> None:
    """Remember the processes that prepare data."""
    _data_workers.update(processes)


def forget_data_workers(processes: Iterable[BaseProcess]) -> None:
    """Forget processes that have done their work."""
    _data_workers.difference_update(processes)


def end_data_workers() -> None:
    """End the processes that still prepare data. They ignore the signals that end a run."""
    has_handler = hasattr(signal, "SIGCHLD")  # PyTorch's handler would raise an error for each of them
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if has_handler else None
    for process in _data_workers:
        process.kill()
        process.join()
    if has_handler:
        signal.signal(signal.SIGCHLD, previous)
    _data_workers.clear()


def user_message(error: Exception, memory_hint: str) -> str | None:
    """The message for an error that the user can correct, or None for a bug.

    Such errors are UserError, out of memory, and the death of a data worker. A dead worker shows in its exit
    code; PyTorch raises a plain RuntimeError for it, at any line of the main process. PyTorch has no error
    type for a CPU that is out of memory: only there the text is searched, for the name of the allocator.
    `memory_hint` names the flags that need less memory.
    """
    first_line = str(error).strip().partition("\n")[0]
    is_cpu_memory = type(error) is RuntimeError and "DefaultCPUAllocator" in first_line
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or is_cpu_memory:
        return f"out of memory ({first_line or type(error).__name__}); {memory_hint}"
    # PyTorch's error may also come during a write, which turns it into a UserError, or be a broken pipe.
    origin = error.__cause__ or error
    if isinstance(origin, RuntimeError | OSError | EOFError) and _has_dead_data_worker():
        return (
            f"a process that prepares data died, possibly out of memory ({first_line}); "
            "fewer --num_workers need less memory"
        )
    return str(error) if isinstance(error, UserError) else None


def _has_dead_data_worker() -> bool:
    for process in _data_workers:
        process.join(timeout=0.1)  # its exit code may not be there yet
    return any(process.exitcode for process in _data_workers)


# --- Signals ----------------------------------------------------------------------------------

# SIGHUP comes when the terminal closes, as with a lost ssh connection; Windows has none.
STOP_SIGNALS = [SIGINT, SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP ends a command.

    name, exit_code: such as "SIGTERM", and 128 + the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name, self.exit_code = signal.Signals(number).name, 128 + number


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """A context in which the first signal raises Interrupted, at any line.

    A second signal ends the process at once.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        for handled in previous:
            signal.signal(handled, signal.SIG_DFL)
        _expect_no_reader()
        raise Interrupted(number)

    previous = _handle_signals(interrupt)
    try:
        yield
    finally:
        _restore_handlers(previous)


def _handle_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Handle SIGINT, SIGTERM and SIGHUP; returns the previous handlers. SIGHUP stays ignored under nohup."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is not None and not isinstance(getattr(sys, name), _Console):
            setattr(sys, name, _Console(getattr(sys, name)))
    return {
        number: signal.signal(number, handler)
        for number in STOP_SIGNALS
        if number in (SIGINT, SIGTERM) or signal.getsignal(number) != signal.SIG_IGN
    }


def _restore_handlers(previous: dict[int, Any]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)


class _Console:
    """A text stream that drops what cannot be written, once a signal has come.

    SIGHUP means that the terminal is gone. Ctrl-C also ends the reader of a pipe, such as `tee`. A print must
    not end the run then.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.may_be_gone = stream, False

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            if not self.may_be_gone:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _expect_no_reader() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Console):
            stream.may_be_gone = True


class Stopped(Exception):
    """A signal ends the run before it is done."""


class StopRequest:
    """A context that notes the first SIGINT, SIGTERM or SIGHUP, so that the run can end with its state saved.

    A second signal raises Interrupted at once.
    """

    signal: int | None = None

    def __init__(self, then: str = "the run ends once its state is saved") -> None:
        """`then` is what the message of the first signal says."""
        self._then = then

    def __enter__(self) -> "StopRequest":
        self._previous = _handle_signals(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        _restore_handlers(self._previous)

    def check(self) -> None:
        """Raise Stopped if a signal was noted. Several processes stop together, after an iteration."""
        if self.signal is not None and world_size() == 1:
            raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise Interrupted(number)
        self.signal = number
        _expect_no_reader()
        print(f"\n{signal.Signals(number).name}: {self._then}", file=sys.stderr)
