"""The CUDA path runs on a stand-in for the CUDA runtime; see fake_cuda_check.py. No GPU is needed."""

import shutil

import pytest
import torch
from fake_cuda_check import CASES, LITE, TINY, TWO_PROCESSES, build_library, run_cases

pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or not (torch.version.cuda or "").startswith("13."),
    reason="needs g++ and a build of PyTorch for CUDA 13",
)
MAX_WAITS = 2  # for the device, in an iteration


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("fake_cuda") / "libcuda.so.1"
    build_library(path)
    return path


def assert_good(results, cases):
    assert len(results) == len(cases)
    for case, result in zip(cases, results, strict=True):
        assert result["code"] == 0, (case, result)
        assert sum(result["waits"].values()) <= MAX_WAITS, (case, result)


def test_every_command_runs_on_cuda_and_waits_at_most_twice_an_iteration(library):
    results = run_cases(library, [*CASES], sm=80)
    assert_good(results, CASES)
    # The counter works: in every iteration, training looks once whether the gradient is finite.
    trainings = [r for case, r in zip(CASES, results, strict=True) if case.startswith("finetune.py")]
    assert len(trainings) == 10 and all(sum(r["waits"].values()) >= 0.5 for r in trainings)
    assert all(result["gb"] > 0 for result in results)


# A T4 takes fused attention only if head widths are multiples of 8.
def test_a_t4_takes_fused_attention(library):
    cases = [f"finetune.py {TINY} --train encoder --prompt box"]
    assert_good(run_cases(library, cases, sm=75), cases)


def test_too_little_memory_ends_a_run_with_a_message(library):
    cases = [f"finetune.py {TINY} --train encoder --prompt box", f"finetune.py {LITE} --train encoder"]
    fits, too_large = run_cases(library, cases, sm=90, gib=1)
    assert_good([fits], cases[:1])
    assert too_large["code"] == 1
    assert "error" not in too_large  # there is no traceback
    assert "out of memory" in too_large["stderr"] and "--batch_size" in too_large["stderr"]


# `lite_medsam` takes 1.5 GB for one sample, 2.7 GB for two, and 5.5 GB for four.
def test_batch_size_auto_divides_a_step_into_the_largest_batches_that_fit(library):
    cases = [f"finetune.py {LITE} --train encoder --batch_size auto --virtual_batch_size {n}" for n in (8, 3)]
    results = run_cases(library, cases, sm=80, gib=4)
    assert_good(results, cases)
    assert [result["batch"] for result in results] == [[2, 4], [1, 3]]


def test_a_benchmark_goes_on_after_a_row_that_needs_too_much_memory(library):
    flags = "--train encoder --parts encoder step loader --seconds 0 --device cuda"
    [result] = run_cases(library, [f"tools/bench.py {LITE} {flags}"], sm=80, gib=2)
    assert "error" not in result and result["code"] == 1
    rows = {row.split(" | ")[0]: row.split(" | ")[1:3] for row in result["stdout"].splitlines()}
    assert rows["| encoder step"] == ["out of memory", "out of memory"]
    assert float(rows["| encoder"][1]) > 0 and float(rows["| loader, one core"][1]) > 0


def test_two_processes_run_on_cuda(library):
    assert_good(run_cases(library, [*TWO_PROCESSES], sm=80, world_size=2), TWO_PROCESSES)
