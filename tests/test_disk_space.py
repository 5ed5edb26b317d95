"""The check of disk space counts what a run writes, and what happens where the disk is too small."""

import errno
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import run_tiny, tiny_config

import checkpoint
import disk_space
import experiment
import finetune
from embeddings import pool_spec
from timing import UNMEASURED_EPOCHS


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_full_disk_refuses_reuse_before_anything_is_written(tiny_weights, config_file, monkeypatch, capsys):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    assert run_tiny(config_file(), tiny_weights, "--embedding_reuse", 2) == 2
    assert "error: --embedding_reuse 2: 0 MiB of embeddings and " in capsys.readouterr().err
    assert not Path("exp").exists()
    photos = config_file(bg_paths=None, w_aug=False)
    with pytest.warns(UserWarning, match="photos are encoded again in every epoch"):
        assert run_tiny(photos, tiny_weights, "-e", 2) == 0


def test_the_check_of_disk_space_counts_the_pool_of_a_machine_once(tiny_weights, config_file, monkeypatch):
    needed = []
    monkeypatch.setattr(disk_space, "require_free_space", lambda folder, size, purpose: needed.append(size))
    for processes in (1, 3):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        experiment.prepare(tiny_config(config_file(), tiny_weights, "--embedding_reuse", 2))
    assert needed[1] == needed[0] > 0


@pytest.mark.parametrize("options", [(), ("--keep_last", 2)])
def test_the_check_of_disk_space_counts_all_that_the_run_writes(
    tiny_weights, config_file, monkeypatch, options
):
    needed = []
    monkeypatch.setattr(disk_space, "require_free_space", lambda folder, size, purpose: needed.append(size))
    photos = config_file(bg_paths=None, w_aug=False)
    options = ("-e", 6, "--save_interval", 1, "--virtual_batch_size", 4, *options)
    assert run_tiny(photos, tiny_weights, *options) == 0
    config = tiny_config(photos, tiny_weights, *options, "--exp_name", "run")
    net, _ = experiment.build_net(config, tiny_weights, torch.device("cpu"))
    written = sum(path.stat().st_size for path in Path("exp/run").rglob("*.pth"))
    pool = pool_spec(6, net).size
    assert written < needed[0] - pool - disk_space.LOGS < 2 * written
    still_needed = disk_space.size_of_saves(config, net, 6)  # if the run is resumed
    assert still_needed < needed[0] - pool - 0.9 * written


@pytest.mark.parametrize("train", ["encoder", "lora"])
def test_the_size_of_saves_counts_an_encoder_that_trains(tiny_weights, config_file, train):
    options = ("-e", 1, "--train", train)
    config = tiny_config(config_file(), tiny_weights, *options)
    net, _ = experiment.build_net(config, tiny_weights, torch.device("cpu"))
    at_start = disk_space.size_of_saves(config, net, 1) - disk_space.LOGS
    finetune.prepare_optimizer(net.sam, config)
    in_training = disk_space.size_of_saves(config, net, 1) - disk_space.LOGS
    assert run_tiny(config_file(), tiny_weights, *options) == 0
    sizes = [path.stat().st_size for path in Path("exp/run").rglob("*.pth")]
    assert sum(sizes) + max(sizes) < in_training <= at_start  # the largest one exists twice for a moment


def test_photos_are_encoded_again_where_checkpoints_leave_no_space_to_keep_them(
    tiny_weights, config_file, monkeypatch
):
    photos = config_file(bg_paths=None, w_aug=False)
    config = tiny_config(photos, tiny_weights, "-e", 20, "--save_interval", 1)
    net, _ = experiment.build_net(config, tiny_weights, torch.device("cpu"))
    usage = shutil.disk_usage(".")
    needed = pool_spec(6, net).size + disk_space.size_of_saves(config, net, 20)
    for lacking, n_slots in ((0, 6), (1, 0)):
        free = needed - lacking
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: usage._replace(free=free))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert experiment.prepare(config).train_set.n_cache_slots == n_slots
        assert len(warned) == lacking


def test_photos_are_encoded_again_if_the_disk_fills_up_after_the_check(
    tiny_weights, config_file, monkeypatch
):
    photos = config_file(bg_paths=None, w_aug=False)
    assert run_tiny(photos, tiny_weights, "-e", 3) == 0
    expected = checkpoint.load_weights(Path("exp/run/checkpoints/last.pth"))

    def fail(descriptor, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.warns(UserWarning, match="cannot reserve .* photos are encoded again in every epoch"):
        assert run_tiny(photos, tiny_weights, "-e", 3, "-n", "again") == 0
    weights = checkpoint.load_weights(Path("exp/again/checkpoints/last.pth"))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert run_tiny(config_file(), tiny_weights, "--embedding_reuse", 2, "-n", "reuse") == 1


def test_a_run_of_minutes_warns_once_its_epochs_are_too_many_for_the_disk(
    tiny_weights, config_file, monkeypatch
):
    flags = ("-b", 2, "--minutes", 5, "--save_interval", 1)
    config = tiny_config(config_file(), tiny_weights, *flags)
    net, _ = experiment.build_net(config, tiny_weights, torch.device("cpu"))
    free = disk_space.size_of_saves(config, net, UNMEASURED_EPOCHS)  # enough without epochs
    usage = shutil.disk_usage(".")._replace(free=free)
    monkeypatch.setattr(finetune.Budget, "epochs", lambda budget, done, iteration, *_: 4 * (iteration == 2))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert run_tiny(config_file(), tiny_weights, *flags) == 0
        assert not warned
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        assert run_tiny(config_file(), tiny_weights, *flags, "-n", "full") == 0
    (text,) = [str(warning.message) for warning in warned]
    assert text.startswith("4 epochs write up to 1") and "to exp/full, but its disk has 10" in text
    assert "--keep_last or --save_interval" in text
