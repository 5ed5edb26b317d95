"""What a run computes once and keeps: decoded files in shared memory, embeddings in a file."""

import mmap
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Hashable
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

MIB = 1 << 20


class DecodedFiles:
    """Arrays made from files, in memory that the process shares with the data workers it forks.

    Every item has its own place, as long as the budget lasts, and its bytes are a function of its
    file alone: two workers that make one item at the same time write the same. Items without a place
    are made anew at every use.

    Args:
        shapes: of the uint8 array that `make(item, longest)` returns, by (make, item).
        max_bytes: the budget.
    """

    def __init__(self, shapes: dict[Hashable, tuple[int, ...]], max_bytes: int) -> None:
        self.places = {}
        end = 0
        for key, shape in shapes.items():
            size = 1 + prod(shape)  # a first byte says whether the rest is there
            if end + size <= max_bytes:
                self.places[key] = end, shape
                end += size
        self._memory = np.frombuffer(mmap.mmap(-1, max(end, 1)), np.uint8)
        self._lock = multiprocessing.Lock()

    def __reduce__(self) -> tuple:
        # Processes that are spawned instead of forked do not see this memory: they go without.
        return DecodedFiles, ({}, 0)

    def __call__(self, make: Callable[..., np.ndarray], item: Hashable, longest: int) -> np.ndarray:
        """What `make(item, longest)` returns, as a read-only array."""
        if (make, item) not in self.places:
            return make(item, longest)
        start, shape = self.places[make, item]
        array = self._memory[start + 1 : start + 1 + prod(shape)].reshape(shape)
        with self._lock:  # also orders the reads of this process after the writes of another
            is_there = self._memory[start]
        if not is_there:
            array[:] = make(item, longest)
            with self._lock:
                self._memory[start] = 1
        array.flags.writeable = False
        return array


class Key(Protocol):
    """What tells one embedding from another: `dataset.Use` is one."""

    place: int | None
    born: int


class EmbeddingPool:
    """Embeddings with their targets and sizes, each in its place of a memory-mapped temporary file.

    The file lies in `folder` but has no name there, so that the disk is free again when the pool is
    let go or the process ends, however it ends. A place holds the sample that was last put there,
    known by the epoch it was born in. Samples without a place are used once: they wait for that in
    memory.

    Args:
        folder: where the file lies; it needs `size` bytes.
        places: how many.
        shape: (C, e, e) of an embedding.
        dtype: float16, or float32 to keep an encoder's output exactly.
        grid: side of a target.
    """

    def __init__(self, folder: Path, places: int, shape: tuple[int, ...], dtype: np.dtype, grid: int) -> None:
        size = self.size(places, shape, dtype, grid)
        with tempfile.TemporaryFile(dir=folder) as file:  # the maps keep it alive
            if hasattr(os, "posix_fallocate"):  # a full disk must fail here, not in the middle of the run
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            self._embeddings = np.memmap(file, dtype, "r+", shape=(places, *shape))
            self._targets = np.memmap(
                file, np.uint8, "r+", offset=self._embeddings.nbytes, shape=(places, 1, grid, grid)
            )
        self._sizes = np.zeros((places, 2), np.int64)
        self._born = np.full(places, -1)
        self._passing = {}

    @staticmethod
    def size(places: int, shape: tuple[int, ...], dtype: np.dtype, grid: int) -> int:
        """Bytes that the file takes."""
        return places * (prod(shape) * np.dtype(dtype).itemsize + grid * grid)

    def holds(self, key: Key) -> bool:
        if key.place is None:
            return key in self._passing
        return self._born[key.place] == key.born

    def put(self, key: Key, embedding: Tensor, target: Tensor, size: Tensor) -> None:
        """Keep a sample that is on the CPU; arguments as `get` returns them, the embedding of any type."""
        if key.place is None:
            self._passing[key] = embedding, target, size
            return
        self._embeddings[key.place] = embedding.to(_torch_dtype(self._embeddings.dtype)).numpy()
        self._targets[key.place] = target.numpy()
        self._sizes[key.place] = size.numpy()
        self._born[key.place] = key.born

    def get(self, key: Key) -> tuple[Tensor, Tensor, Tensor]:
        """`embedding` (C, e, e), `target` uint8 (1, grid, grid), `size` int64 (2,), not to be changed."""
        if key.place is None:
            return self._passing.pop(key)
        arrays = self._embeddings[key.place], self._targets[key.place], self._sizes[key.place]
        return tuple(torch.from_numpy(array) for array in arrays)


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return torch.float16 if dtype == np.float16 else torch.float32


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise OSError unless the disk of `folder` (or of its nearest parent) has `needed` bytes."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{what} would take {needed / MIB:.0f} MiB on the disk of {folder.resolve()}, "
            f"which has {free / MIB:.0f} MiB left"
        )
