"""Several processes that train as one, started by torchrun: who this one is, and what all of them share.

Gradients are sums over samples, so adding up those of all processes gives the gradient of the whole batch,
whatever each one's share of it; a share may even be empty. `DistributedDataParallel` would average instead,
and needs every process in every backward pass.
"""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from base.errors import UserError


def rank() -> int:
    """Number of this process, from 0; process 0 alone prints and writes."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def join_process_group(device: torch.device) -> torch.device:
    """Meet the other processes, if there are any; returns the device of this one."""
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
    if world_size() > 1:
        all_reduce_max([0])


def all_reduce_sum(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, in place, by its sum over all processes."""
    if world_size() > 1:
        for pending in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            pending.wait()


def all_reduce_gradients(parameters: list[nn.Parameter]) -> None:
    """The same for gradients, of which a process without samples has none."""
    if world_size() > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        all_reduce_sum(parameter.grad for parameter in parameters)


def gather(items: list) -> list:
    """The items of all processes, those of process 0 first."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def all_reduce_max(values: list[int]) -> list[int]:
    """The largest that any process gives, value by value: what all of them then agree on."""
    if world_size() == 1:
        return values
    agreed = torch.tensor(values)  # on the CPU: no device has to be waited for
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return agreed.tolist()


# --- Device and precision ---------------------------------------------------------------------


def pick_device(choice: str) -> torch.device:
    """The device asked for, or for "auto" the first there is of cuda, mps, cpu."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if choice == "auto":
        choice = next(name for name, there in available.items() if there)
    if not available[choice]:
        raise UserError(f"--device {choice}: PyTorch finds no such device on this machine")
    return torch.device(choice)


def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The low precision that `--amp` asks for, or None for float32.

    "auto" takes bfloat16 where the hardware computes in it (CUDA 8.0+, CPUs with AVX512-BF16 or AMX),
    and float16 on older CUDA.
    """
    if choice != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[choice]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # which, by torch version
        if any(getattr(torch.cpu, check, lambda: False)() for check in checks):
            return torch.bfloat16
    return None


def autocast(device: torch.device, low_precision: torch.dtype | None) -> AbstractContextManager:
    """What `amp_dtype` chose, as a context to compute in."""
    return torch.autocast(device.type, low_precision) if low_precision else nullcontext()
