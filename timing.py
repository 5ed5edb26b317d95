"""The clocks of a run: time, images per second, the epochs that fit into `--minutes`."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from train_state import Schedule

WARM_UP = 3  # iterations that are not timed, because they allocate memory and choose kernels
MIN_TIMED = 10  # iterations
MIN_SHARE, MAX_SHARE = 0.05, 0.5  # of the minutes that measuring takes
UNMEASURED_EPOCHS = 10**6  # of a run of --minutes, until its speed is known


class Timer:
    """Seconds since the last `restart`, without the time inside `paused`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start, self._paused = time.monotonic(), 0.0

    def seconds(self) -> float:
        return time.monotonic() - self._start - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start


class Throughput:
    """Images per second and the share of time spent waiting for data, since the last `restart`."""

    def __init__(self) -> None:
        self._timer = Timer()
        self.restart()

    def restart(self) -> None:
        self._timer.restart()
        self._images, self._data_wait = 0, 0.0

    def count(self, images: int, data_wait: float) -> None:
        """Count the images of one iteration, and the seconds that it waited for data."""
        self._images += images
        self._data_wait += data_wait

    def rates(self) -> dict[str, float]:
        seconds = self._timer.seconds()
        return {"images_per_s": self._images / seconds, "data_wait": self._data_wait / seconds}

    def paused(self) -> AbstractContextManager[None]:
        """A context whose time does not count."""
        return self._timer.paused()


class Budget:
    """Measures the speed of a run of `--minutes`, from which its number of epochs follows.

    test_seconds: how long a test takes.
    """

    def __init__(self, minutes: float | None, encoding: int) -> None:
        """`encoding` is the number of first iterations that are slow, because they encode for later ones."""
        self._seconds, self._encoding = 60 * minutes if minutes else None, encoding
        self.elapsed, self._timer, self._untimed = Timer(), Timer(), 0
        self.test_seconds = 0.0

    def paused(self) -> AbstractContextManager[None]:
        """A context whose time does not count as that of iterations."""
        return self._timer.paused()

    def epochs(self, done: int, iteration: int, schedule: Schedule, test_interval: int) -> int:
        """How many epochs the run has, at least the current one; 0 until this is measured.

        done, iteration: iterations that this process and the run have done.
        """
        if self._seconds is None:
            return 0
        if done in (WARM_UP, self._encoding):
            self._timer.restart()
            self._untimed = done
        timed, share = done - self._untimed, self.elapsed.seconds() / self._seconds
        is_exact = self._untimed >= self._encoding and timed >= MIN_TIMED and share >= MIN_SHARE
        if not timed or not (is_exact or share >= MAX_SHARE):
            return 0
        seconds = self._timer.seconds() / timed + self.test_seconds / test_interval
        possible = iteration + max(0.0, self._seconds - self.elapsed.seconds()) / seconds
        length = schedule.batches_per_epoch
        return max(iteration // length + 1, int(possible // length))
