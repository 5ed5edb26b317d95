"""The CUDA path runs on a stand-in for the CUDA runtime; see fake_cuda_check.py. No GPU is needed."""

import shutil

import pytest
import torch
from fake_cuda_check import CASES, LITE, TINY, build_library, run_cases

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
    assert all(sum(result["waits"].values()) >= 0.5 for result in results[:7])
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


# 1 sample: the second process has none in any iteration.
def test_two_processes_run_on_cuda(library):
    cases = [f"finetune.py {TINY} --config one.yaml --amp fp16 --train encoder --epoch_num 2"]
    assert_good(run_cases(library, cases, sm=80, world_size=2), cases)
