"""A cache of decoded files in memory that data workers share."""

import mmap
import multiprocessing
from collections.abc import Callable, Hashable, Mapping
from math import prod
from typing import Any

import numpy as np

BYTES_PER_SIZE = 16  # two int64


class DecodedCache:
    """Arrays made from files, in memory that this process shares with the data workers it forks.

    Each item has a slot of its own until the budget is used up. An item without a slot is made again at
    every use. No item replaces another: in an epoch, all files are used about equally often, so an item would
    be replaced before its next use.

    An array depends on its file alone: if two workers make the same item at the same time, they write the
    same bytes.

    A copy in a spawned process does not see the shared memory and has no slots.

    Args:
        shapes: by (make, item), the largest shape (H, W, C) of the uint8 array that `make(item, longest)`
            returns. The first items get slots.
        max_bytes: the budget.
    """

    def __init__(self, shapes: Mapping[Hashable, tuple[int, int, int]], max_bytes: int) -> None:
        # by (make, item): the number of the slot, its first byte, and the largest shape
        self.slots: dict[Hashable, tuple[int, int, tuple[int, int, int]]] = {}
        end = 0
        for key, shape in shapes.items():
            if end + prod(shape) + BYTES_PER_SIZE * (len(self.slots) + 1) <= max_bytes:
                self.slots[key] = len(self.slots), end, shape
                end += prod(shape)
        self._memory = np.frombuffer(mmap.mmap(-1, max(end, 1)), np.uint8)
        sizes = mmap.mmap(-1, BYTES_PER_SIZE * max(len(self.slots), 1))
        self._sizes = np.frombuffer(sizes, np.int64).reshape(-1, 2)  # (h, w), or 0 until an array is complete
        self._lock = multiprocessing.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return DecodedCache, ({}, 0)

    def __call__(self, make: Callable[..., np.ndarray], item: Hashable, longest: int) -> np.ndarray:
        """Return `make(item, longest)`, from the cache if possible; an array of the cache is read-only.

        `longest` must be the same at every call: it is not part of the key.
        """
        if (make, item) not in self.slots:
            return make(item, longest)
        slot, start, (_, _, channels) = self.slots[make, item]
        with self._lock:  # also makes the array visible that another process completed
            height, width = self._sizes[slot].tolist()
        if not height:
            made = make(item, longest)
            height, width = made.shape[:2]
            self._memory[start : start + made.size] = made.reshape(-1)
            with self._lock:
                self._sizes[slot] = height, width
        array = self._memory[start : start + height * width * channels].reshape(height, width, channels)
        array.flags.writeable = False
        return array
