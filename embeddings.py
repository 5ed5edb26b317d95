"""Embeddings that are computed once and kept in a file."""

import os
import tempfile
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


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
