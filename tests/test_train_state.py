"""The arithmetic of the schedule."""

import pytest

from train_state import Schedule, learning_rate


def test_learning_rate_at_its_corners():
    def lr(step, **changes):
        return learning_rate(step, **{"total_steps": 100, "peak": 2.0, "warmup": 10, "power": 0.9, **changes})

    assert lr(0) == pytest.approx(0.2)  # never zero on the first step
    assert lr(9) == lr(10) == 2.0
    assert lr(55) == pytest.approx(2.0 * 0.5**0.9)
    assert lr(99) == pytest.approx(2.0 * (1 / 90) ** 0.9) and lr(99) > 0
    assert lr(0, warmup=0) == 2.0
    assert lr(77, power=0.0) == 2.0
    assert lr(4, warmup=10, total_steps=5) == 1.0  # a run shorter than its warm-up
    assert lr(0, warmup=10, total_steps=10) == 0.2


@pytest.mark.parametrize(
    ("n", "batch", "virtual", "iterations", "steps", "samples"),
    [
        (12, 4, 1, 3, 3, [4, 4, 4]),
        (10, 4, 1, 3, 3, [4, 4, 2]),
        (10, 2, 2, 5, 3, [4, 4, 4, 4, 2]),
        (7, 2, 3, 4, 2, [6, 6, 6, 1]),
        (3, 8, 4, 1, 1, [3]),
    ],
)
def test_schedule(n, batch, virtual, iterations, steps, samples):
    schedule = Schedule(n, batch, virtual, epochs=5)
    assert (schedule.iterations, schedule.steps) == (5 * iterations, 5 * steps)
    assert [schedule.samples_in_step(i) for i in range(iterations)] == samples
    assert sum(schedule.ends_step(i) for i in range(iterations)) == steps and schedule.ends_step(
        iterations - 1
    )
