"""Decoded files, kept in memory that data workers share."""

import mmap
import multiprocessing
from collections.abc import Callable, Hashable
from math import prod

import numpy as np


class DecodedCache:
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
        return DecodedCache, ({}, 0)

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
