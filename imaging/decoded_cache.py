"""A cache of decoded files in memory that data workers share."""

import mmap
import multiprocessing
from collections.abc import Callable, Hashable, Mapping
from math import prod
from typing import Any

import numpy as np


class DecodedCache:
    """Arrays made from files, in memory that this process shares with the data workers it forks.

    Each item has a slot of its own until the budget is used up. An item without a slot is made again at
    every use. An array depends on its file alone: if two workers make the same item at the same time,
    they write the same bytes.

    A copy in a spawned process does not see the shared memory and has no slots.

    Args:
        shapes: shape of the uint8 array that `make(item, longest)` returns, by (make, item).
        max_bytes: the budget.
    """

    def __init__(self, shapes: Mapping[Hashable, tuple[int, ...]], max_bytes: int) -> None:
        self.slots: dict[Hashable, tuple[int, tuple[int, ...]]] = {}  # offset and shape by (make, item)
        end = 0
        for key, shape in shapes.items():
            size = 1 + prod(shape)  # the first byte is 1 once the array is complete
            if end + size <= max_bytes:
                self.slots[key] = end, shape
                end += size
        self._memory = np.frombuffer(mmap.mmap(-1, max(end, 1)), np.uint8)
        self._lock = multiprocessing.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return DecodedCache, ({}, 0)

    def __call__(self, make: Callable[..., np.ndarray], item: Hashable, longest: int) -> np.ndarray:
        """Return `make(item, longest)`, from the cache if possible; an array of the cache is read-only.

        `longest` must be the same at every call: it is not part of the key.
        """
        if (make, item) not in self.slots:
            return make(item, longest)
        start, shape = self.slots[make, item]
        array = self._memory[start + 1 : start + 1 + prod(shape)].reshape(shape)
        with self._lock:  # also makes the array visible that another process completed
            is_complete = bool(self._memory[start])
        if not is_complete:
            array[:] = make(item, longest)
            with self._lock:
                self._memory[start] = 1
        array.flags.writeable = False
        return array
