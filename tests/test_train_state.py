"""The arithmetic of the schedule, and the steps that count."""

from pathlib import Path

import pytest
import torch
from conftest import run_tiny, scalars

import resume
from train_state import Schedule, TrainState, build_optimizer, learning_rate


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


# --- the optimizer ---


def small_state(fused):
    """The state of a weight of 3 numbers. A CPU has a fused kernel too."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = torch.optim.AdamW([{"params": [weight], "peak_lr": 1.0}], fused=fused)
    return TrainState(optimizer, torch.amp.GradScaler("cpu", enabled=False), {})


def take_steps(state, n):
    for _ in range(n):
        for weight in state.parameters:
            weight.grad = weight.detach().sin()
        state.optimizer.step()


@pytest.mark.parametrize("before", [None, True])
@pytest.mark.parametrize("after", [None, True])
def test_a_run_resumes_with_or_without_the_fused_optimizer_whatever_it_had_before(before, after, tmp_path):
    whole, first, second = small_state(after), small_state(before), small_state(after)
    take_steps(whole, 5)
    take_steps(first, 2)
    torch.save(first.state_dict(), tmp_path / "state.pth")
    with torch.no_grad():
        second.parameters[0].copy_(first.parameters[0])
    second.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    assert second.optimizer.param_groups[0]["fused"] is after
    take_steps(second, 3)
    torch.testing.assert_close(second.parameters, whole.parameters, rtol=1e-6, atol=0)
    assert second.optimizer.state[second.parameters[0]]["step"] == 5


def test_the_optimizer_is_fused_on_cuda_alone():
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "peak_lr": 1.0}]
    fused = [
        build_optimizer(groups, 0.1, torch.device(name)).defaults["fused"] for name in ("cpu", "mps", "cuda")
    ]
    assert fused == [None, None, True]


# --- steps that are not finite ---

# 9 samples in batches of 1: 27 iterations.
FP16 = ("--amp", "fp16", "-b", 1, "-e", 3, "--log_interval", 1)


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def spoil(batch, net):
    batch["embedding"].fill_(float("nan"))


@pytest.mark.usefixtures("in_tmp_path")
def test_fp16_repeats_a_step_with_a_lower_scale(config_file, tiny_weights, at_iteration):
    at_iteration(range(1, 4), spoil)
    options = (*FP16, "--max_bad_steps", 2, "--warmup_steps", 5, "--lr", 1e-3)
    assert run_tiny(config_file(percentage=1.5), tiny_weights, *options) == 0
    curves = scalars("exp/run")
    assert [value for _, value in curves["train/bad_steps"]] == [0] * 27
    rates = [rate for _, rate in curves["train/lr"][:6]]  # the warm-up begins with the first good step
    assert rates == pytest.approx([2e-4, 2e-4, 2e-4, 2e-4, 4e-4, 6e-4])
    state = resume.load_resume_state(Path("exp/run/resume.pth"))["train_state"]
    assert state["scaler"]["scale"] == 2**13  # from 2^16
    assert state["counters"]["step"] == 24


@pytest.mark.usefixtures("in_tmp_path")
def test_fp16_counts_bad_steps_once_its_scale_is_1(config_file, tiny_weights, at_iteration, capsys):
    at_iteration(range(1, 99), spoil)
    assert run_tiny(config_file(percentage=1.5), tiny_weights, *FP16, "--max_bad_steps", 3) == 1
    error = capsys.readouterr().err
    assert "iteration 19: the loss or its gradient was not finite in 3 steps in a row" in error
