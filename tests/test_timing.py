"""The time that counts, and the number of epochs that follows from it."""

import pytest

import timing
from timing import Budget, Throughput, Timer
from train_state import Schedule


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` lets time pass."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_paused_time_does_not_count(clock):
    timer = Timer()
    clock(2)
    with timer.paused():
        clock(50)
    clock(3)
    assert timer.seconds() == 5
    timer.restart()
    clock(1)
    assert timer.seconds() == 1


def test_throughput_counts_images_and_the_share_of_waiting(clock):
    throughput = Throughput()
    for _ in range(2):
        clock(5)
        throughput.count(4, data_wait=2.0)
    with throughput.paused():
        clock(90)
    assert throughput.rates() == {"images_per_s": 0.8, "data_wait": 0.4}
    throughput.restart()
    clock(2)
    throughput.count(4, data_wait=0.0)
    assert throughput.rates() == {"images_per_s": 2.0, "data_wait": 0.0}


def epochs_of(budget, clock, seconds, pause=0.0):
    """(iteration, epochs) once `budget` knows them, for iterations of so many seconds: 5 make an epoch."""
    schedule = Schedule(epoch_length=10, batch_size=2, virtual_batch_size=1, epochs=99)
    for iteration in range(1, 99):
        clock(seconds(iteration))
        epochs = budget.epochs(iteration, iteration, schedule, test_interval=4)
        with budget.paused():
            clock(pause)
        if epochs:
            return iteration, epochs
    return None


def test_epochs_follow_from_the_speed_of_the_first_iterations(clock):
    assert epochs_of(Budget(None, 0), clock, lambda iteration: 1) is None
    # 60 s: 3 iterations take 6 s and are not timed, 10 take 10 s, and 44 s are left
    assert epochs_of(Budget(1, 0), clock, lambda iteration: 1 if iteration > 3 else 2) == (13, (13 + 44) // 5)
    # with tests: 47 s are left after the 13th iteration, and 4 s of a test are 1 s an iteration
    budget = Budget(1, 0)
    budget.test_seconds = 4.0
    assert epochs_of(budget, clock, lambda iteration: 1) == (13, (13 + 47 // 2) // 5)
    # pauses count as time of the run, but not of an iteration: 60 - 13 - 12 = 35 s are left
    assert epochs_of(Budget(1, 0), clock, lambda iteration: 1, pause=1.0) == (13, (13 + 35) // 5)
    # long runs measure for a twentieth of their time
    assert epochs_of(Budget(10, 0), clock, lambda iteration: 1) == (30, 600 // 5)


def test_a_budget_does_not_count_on_the_speed_of_iterations_that_encode_for_later_ones(clock):
    # the first epoch takes 2 s an iteration, later ones 0.5 s; timing starts after it
    found = epochs_of(Budget(1, 5), clock, lambda iteration: 2 if iteration <= 5 else 0.5)
    assert found == (15, (15 + 45 * 2) // 5)
    # if the first epoch takes too long, what is known after half the time counts
    assert epochs_of(Budget(1, 50), clock, lambda iteration: 4) == (8, (8 + 28 // 4) // 5)
    assert epochs_of(Budget(0.1, 50), clock, lambda iteration: 9) == (1, 1)  # at least the current epoch
