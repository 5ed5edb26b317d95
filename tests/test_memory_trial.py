"""`--batch_size auto`; the trial itself runs in test_cuda_stand_in.py, where memory is limited."""

import pytest
import torch
import yaml
from conftest import run_tiny

import memory_trial
import train_config

CUDA = torch.device("cuda")


def auto(*flags):
    given = ["--config", "c.yaml", "--train", "decoder", "--batch_size", "auto"]
    return train_config.parse_args([*given, *flags])


def resolved(config, device):
    config = memory_trial.with_batch_size(config, device, build=lambda: (None, None))
    return config.batch_size, config.virtual_batch_size


@pytest.fixture
def memory(monkeypatch):
    """`memory(fits, peak)`: a batch above `fits` runs out of memory; any other needs `peak` of 120 bytes."""

    def needs_memory(fits):
        def step(batch_size):
            if batch_size > fits:
                raise torch.OutOfMemoryError

        return step

    def limit(fits, peak):
        for name in ("empty_cache", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda *args: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: peak)
        monkeypatch.setattr(memory_trial, "trial_step", lambda config, net, spec: needs_memory(fits))

    return limit


@pytest.mark.parametrize(
    ("flags", "fits", "batches"),
    [
        (["--virtual_batch_size", "8"], 20, (16, 2)),
        (["--virtual_batch_size", "8"], 100, (32, 1)),
        (["--train", "lora", "--virtual_batch_size", "6"], 5, (3, 2)),
        ([], 0, (1, 4)),  # training then says what needs less memory
    ],
)
def test_a_step_keeps_its_samples_in_the_largest_batches_that_fit(memory, flags, fits, batches):
    memory(fits, peak=108)
    assert resolved(auto(*flags), CUDA) == batches


def test_a_tenth_of_the_free_memory_is_left(memory):
    memory(fits=8, peak=108)
    assert resolved(auto("--virtual_batch_size", "4"), CUDA) == (8, 2)
    memory(fits=8, peak=109)
    assert resolved(auto("--virtual_batch_size", "4"), CUDA) == (1, 16)


@pytest.mark.parametrize("name", ["cpu", "mps"])
def test_elsewhere_auto_is_the_default(name):
    flags = ["--virtual_batch_size", "3"]
    assert resolved(auto(*flags), torch.device(name)) == (4, 3)
    assert resolved(auto(*flags, "--train", "encoder"), torch.device(name)) == (1, 3)


def test_a_number_is_kept():
    config = train_config.parse_args(["--config", "c.yaml", "--batch_size", "7"])
    assert memory_trial.with_batch_size(config, CUDA, build=lambda: (None, None)) is config


def test_the_numbers_are_recorded_and_a_resumed_run_keeps_them(
    tmp_path, monkeypatch, config_file, tiny_weights
):
    monkeypatch.chdir(tmp_path)
    flags = ("--batch_size", "auto", "--virtual_batch_size", 2)
    assert run_tiny(config_file(), tiny_weights, *flags, "--epoch_num", 1) == 0
    path = tmp_path / "exp/run/args.yaml"
    stored = yaml.safe_load(path.read_text())
    assert (stored["batch_size"], stored["virtual_batch_size"]) == (4, 2)
    stored |= {"batch_size": 2, "virtual_batch_size": 4}  # as if they had been found on a CUDA device
    path.write_text(yaml.safe_dump(stored))
    config = train_config.parse_args(["--exp_name", "run", "--resume", *map(str, flags)])
    assert (config.batch_size, config.virtual_batch_size) == (2, 4)
