"""Runs that are killed, stopped, starved or fed with garbage: nothing is lost, and all is said."""

import errno
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import sys
import time
import zlib
from itertools import pairwise
from multiprocessing import popen_fork
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FLAGS, assert_same_results, run_process, run_tiny, scalars
from PIL import Image
from tiny_run import run_forked

import checkpoint
import dataset
import dataset_index
import finetune
import resume
import runtime
from config import load_config
from dataset_index import index_datasets
from imaging import compositing, files, geometry

TINY_RUN = Path(__file__).parent / "tiny_run.py"


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, "RETRY_AFTER", 0.0)


def apart(config, weights, *argv):
    """The flags of a run in a process of its own, where `tiny_run.py` says what else happens to it."""
    given = ("-c", config, "--model_type", "tiny", "--checkpoint", weights, "-n", "run")
    return *given, "--device", "cpu", "--amp", "off", *FLAGS, *argv


def test_a_run_killed_again_and_again_ends_as_if_it_were_not(config, tiny_weights, whole_run):
    # A state is saved at every iteration.
    flags = apart(config, tiny_weights, "--num_workers", 1, "--resume_interval", 1e-9)
    left, rng = 20, random.Random(0)
    while left > 5:
        kill_in = rng.randint(2, 8)
        process = run_forked(*flags, KILL_IN=kill_in)
        assert process.returncode == -signal.SIGKILL, process.stderr
        left -= kill_in - 1
        flags += ("--resume",) * ("--resume" not in flags)
    process = run_forked(*flags)
    assert process.returncode == 0, process.stderr
    assert f"resumed     after iteration {20 - left}" in process.stdout
    assert_same_results("exp/run", whole_run)
    assert not list(Path("exp/run").rglob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_iteration(
    config, tiny_weights, whole_run, at_iteration, capsys, number
):
    handler = signal.getsignal(number)  # which a shell may have set to "ignore"
    at_iteration(8, lambda batch, net: os.kill(os.getpid(), number))  # amid an optimizer step
    assert run_tiny(config, tiny_weights, *FLAGS) == 128 + number
    assert "--exp_name run --resume" in capsys.readouterr().err
    assert not Path("exp/run/checkpoints/last.pth").exists()
    assert run_tiny(config, tiny_weights, *FLAGS, "--resume") == 0
    assert "resumed     after iteration 8" in capsys.readouterr().out
    assert_same_results("exp/run", whole_run)
    assert signal.getsignal(number) is handler


def test_a_signal_to_the_process_group_keeps_the_state(config, tiny_weights, whole_run, capsys):
    flags = apart(config, tiny_weights, "--num_workers", 2)
    process = run_process(sys.executable, TINY_RUN, *flags, GROUP_IN=8)
    assert process.returncode == 143, process.stderr
    assert "--exp_name run --resume" in process.stderr and "Traceback" not in process.stderr
    assert run_tiny(config, tiny_weights, *FLAGS, "--resume") == 0
    assert "resumed     after iteration 8" in capsys.readouterr().out
    assert_same_results("exp/run", whole_run)


def test_only_the_last_epochs_are_kept(config, tiny_weights):
    assert run_tiny(config, tiny_weights, *FLAGS, "--save_interval", 1, "--keep_last", 2) == 0
    files = {path.name for path in Path("exp/run/checkpoints").iterdir()}
    names = {"epoch_0003", "epoch_0004", "best", "last"}
    assert files == {f"{name}{suffix}" for name in names for suffix in (".pth", ".json")}


def test_a_full_disk_leaves_the_last_state(config, tiny_weights, whole_run):
    process = run_process(sys.executable, TINY_RUN, *apart(config, tiny_weights), FULL_IN=8)
    assert process.returncode == 1, process.stderr
    assert process.stderr.count("error: ") == 1 and "Traceback" not in process.stderr, process.stderr
    assert "--exp_name run --resume" in process.stderr
    assert not list(Path("exp/run").rglob("*.tmp"))
    checkpoint.load_weights(Path("exp/run/checkpoints/best.pth"))  # of iteration 6, intact
    assert run_tiny(config, tiny_weights, *FLAGS, "--resume") == 0
    assert_same_results("exp/run", whole_run)


# --- whatever ends a run, the state of the last iteration is kept ---


def fail_in_forward(error):
    def act(batch, net):
        raise error

    return act


def fail_in_backward(error):
    def act(batch, net):
        def fail(gradient):
            raise error

        batch["embedding"].requires_grad_().register_hook(fail)

    return act


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    MemoryError("Unable to allocate 3. GiB for an array"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["CUDA", "numpy", "CPU"])
def test_out_of_memory_names_the_flags_that_help(
    config, tiny_weights, whole_run, at_iteration, capsys, error
):
    at_iteration(9, fail_in_forward(error))
    assert run_tiny(config, tiny_weights, *FLAGS) == 1
    message = capsys.readouterr().err
    assert "error: out of memory" in message and "Traceback" not in message
    assert all(flag in message for flag in ("--batch_size", "--grad_checkpointing", "--amp", "--resume"))
    assert run_tiny(config, tiny_weights, *FLAGS, "--resume", "--grad_checkpointing") == 0
    assert "resumed     after iteration 8" in capsys.readouterr().out
    assert_same_results("exp/run", whole_run)


# Steps end after the iterations 2 4 5 7 9 10 12: a failure in the backward pass of iteration 7 spoils the
# gradients of iteration 6, so the state of the test after iteration 6 stays the last one.
@pytest.mark.parametrize(("failing", "kept"), [(8, 7), (7, 6)])
def test_a_failing_backward_pass_leaves_an_exact_state(
    config, tiny_weights, whole_run, at_iteration, capsys, failing, kept
):
    at_iteration(failing, fail_in_backward(OUT_OF_MEMORY[0]))
    assert run_tiny(config, tiny_weights, *FLAGS) == 1
    assert run_tiny(config, tiny_weights, *FLAGS, "--resume") == 0
    assert f"resumed     after iteration {kept}" in capsys.readouterr().out
    assert_same_results("exp/run", whole_run)


def test_a_bug_shows_its_traceback_and_the_state_is_kept(
    config, tiny_weights, whole_run, at_iteration, capsys
):
    at_iteration(8, fail_in_forward(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        run_tiny(config, tiny_weights, *FLAGS)
    assert "--exp_name run --resume" in capsys.readouterr().err
    assert run_tiny(config, tiny_weights, *FLAGS, "--resume") == 0
    assert "resumed     after iteration 7" in capsys.readouterr().out
    assert_same_results("exp/run", whole_run)


# --- numerical faults ---


def spoil(batch, net):
    batch["embedding"].fill_(float("nan"))


def test_a_step_that_is_not_finite_is_left_out(config, tiny_weights, at_iteration):
    at_iteration(7, spoil)
    assert run_tiny(config, tiny_weights, *FLAGS) == 0
    weights, curves = checkpoint.load_weights(Path("exp/run/checkpoints/last.pth")), scalars("exp/run")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert curves["train/bad_steps"][-1][1] == 1
    assert np.isfinite([loss for _, loss in curves["train/loss"][-2:]]).all()


def test_many_such_steps_end_the_run(config, tiny_weights, at_iteration, capsys):
    at_iteration(range(8, 99), spoil)
    assert run_tiny(config, tiny_weights, *FLAGS, "--max_bad_steps", 3) == 1
    error = capsys.readouterr().err
    # Steps end after the iterations 2 4 5 7 9 10 12: the third bad one is the last of these.
    assert "iteration 12: the loss or its gradient was not finite in 3 steps in a row" in error
    assert "exp/run/checkpoints/best.pth" in error
    assert re.search(r"the last batch holds \S+/cables/imgs/\d\.png", error)


def test_weights_that_are_not_finite_are_never_the_best(config, tiny_weights, at_iteration):
    def spoil_weights(batch, net):
        net.sam.mask_decoder.iou_token.weight.data.fill_(float("nan"))

    at_iteration(3, spoil_weights)
    assert run_tiny(config, tiny_weights, *FLAGS, "--max_bad_steps", 99) == 0
    assert Path("exp/run/checkpoints/last.pth").exists()
    assert not Path("exp/run/checkpoints/best.pth").exists()


# --- faults in the data during the run ---


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes_ends_the_run_with_its_state(
    config, tiny_weights, data, whole_run, at_iteration, capsys, workers
):
    options = (*FLAGS, "--cache_mb", 0, "--num_workers", workers)
    background = next((data / "backgrounds").iterdir())
    content = background.read_bytes()
    at_iteration(8, lambda batch, net: background.unlink())
    assert run_tiny(config, tiny_weights, *options) == 1
    error = capsys.readouterr().err
    assert f"{background.name}: cannot be decoded" in error and "Traceback" not in error
    background.write_bytes(content)
    assert run_tiny(config, tiny_weights, *options, "--resume") == 0
    assert int(re.search(r"after iteration (\d+)", capsys.readouterr().out)[1]) >= 8
    assert_same_results("exp/run", whole_run)


def test_a_photo_that_is_replaced_by_one_of_another_size_is_named(
    config, tiny_weights, data, at_iteration, capsys
):
    def replace_photos(batch, net):
        for path in (data / "cables/imgs").iterdir():
            Image.new("RGB", (30, 20)).save(path)

    at_iteration(8, replace_photos)
    assert run_tiny(config, tiny_weights, *FLAGS, "--cache_mb", 0) == 1
    error = capsys.readouterr().err
    assert "is 20 x 30 (h x w) but its mask is 48 x 64" in error and "Traceback" not in error
    state = resume.load_resume_state(Path("exp/run/resume.pth"))
    assert state["train_state"]["counters"]["iteration"] >= 8


def test_a_test_image_that_vanishes_after_the_check_is_named(config, tiny_weights, data, monkeypatch, capsys):
    def index_then_remove(*args, **kwargs):
        datasets = index_datasets(*args, **kwargs)
        (data / "test/imgs/1.png").unlink()
        return datasets

    monkeypatch.setattr(dataset_index, "index_datasets", index_then_remove)
    assert run_tiny(config, tiny_weights, *FLAGS) == 1
    error = capsys.readouterr().err
    assert "test/imgs/1.png: cannot be decoded" in error and "Traceback" not in error


def test_a_file_that_is_back_at_once_is_read_again(data, config, monkeypatch):
    config = load_config(config)
    datasets = index_datasets(list(config.dataset.train))
    train_set = dataset.TrainSet(datasets, spec=geometry.InputSpec(64, 32), prompt="none", seed=0)
    key = train_set.epoch(0)[0]
    expected, read_image, calls = train_set[key], compositing.read_image, []

    def fail_once(path, longest):
        calls.append(path)
        if len(calls) == 1:
            raise files.FileError("hiccup")
        return read_image(path, longest)

    monkeypatch.setattr(compositing, "read_image", fail_once)
    assert torch.equal(train_set[key]["image"], expected["image"])


def test_a_data_worker_that_dies_is_reported(config, tiny_weights, at_iteration, whole_run, capsys):
    def kill_worker(batch, net):
        process = multiprocessing.active_children()[0]
        os.kill(process.pid, signal.SIGKILL)
        process.join()

    at_iteration(8, kill_worker)
    assert run_tiny(config, tiny_weights, *FLAGS, "--num_workers", 1) == 1
    error = capsys.readouterr().err
    assert "a process that prepares data died" in error and "Traceback" not in error
    assert run_tiny(config, tiny_weights, *FLAGS, "--num_workers", 1, "--resume") == 0
    assert_same_results("exp/run", whole_run)


# --- find_leaks ---


def test_a_photo_in_training_and_test_is_named(config, tiny_weights, data, capsys):
    leaked = data / "test/imgs/1.png"
    assert run_tiny(config, tiny_weights, "-e", 1) == 0
    assert "does not measure generalization" not in capsys.readouterr().err
    Image.open(data / "cables/imgs/4.png").save(leaked, compress_level=1)  # other bytes, the same pixels
    with pytest.warns(UserWarning, match="does not measure generalization") as warned:
        assert run_tiny(config, tiny_weights, "-e", 1, "-n", "leaky") == 0
    message = str(warned[0].message)
    assert message.endswith(f":\n  {leaked} = {data / 'cables/imgs/4.png'}")


def test_other_data_does_not_go_on(config, tiny_weights, data, capsys):
    assert run_tiny(config, tiny_weights, "-e", 1) == 0
    changed = data / "backgrounds/bg 1.jpg"
    Image.new("RGB", (90, 70)).save(changed)
    assert run_tiny(config, tiny_weights, "-e", 2, "--resume") == 2
    assert "since it began:\n  changed: dataset 1: bg_paths[0]/bg 1.jpg\n" in capsys.readouterr().err


# --- hostile input: each through the real command ---


def png_header(width, height):
    """The start of a PNG file that claims a size, and nothing more."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 1 << 20) + b"IDAT"


def spoil_photo(data, kind):
    """Replace a photo; returns what the message must say of it, or None if it is to be read."""
    path = data / "cables/imgs/0.png"
    photo = Image.open(path).convert("RGB")
    path.unlink()
    if kind == "bomb":
        path.write_bytes(png_header(60_000, 60_000))
        return "0.png: has 60000 x 60000 pixels, more than --max_pixels 100000000"
    if kind == "zero bytes":
        path.write_bytes(b"")
        return "0.png: cannot be decoded"
    if kind == "symlink loop":
        path.symlink_to(path)
        return "0.png: cannot be decoded"
    if kind == "pipe":
        os.mkfifo(path)
        return "0.png: cannot be decoded"
    if kind == "folder":
        path.mkdir()
        return "0.png: cannot be decoded"
    if kind == "16 bits":
        Image.fromarray(np.full((48, 64), 40_000, np.uint16)).save(path)
        return "0.png: expected 8-bit gray or color"
    if kind == "turned by EXIF":  # the photo, but not its mask
        exif = Image.Exif()
        exif[0x0112] = 6
        photo.save(path.with_suffix(".jpg"), exif=exif)
        return "0.jpg: is 64 x 48 (h x w) but its mask is 48 x 64"
    if kind == "CMYK":
        photo.convert("CMYK").save(path.with_suffix(".jpg"))
    elif kind == "palette":
        photo.convert("P").save(path)
    elif kind == "RGBA":
        photo.convert("RGBA").save(path)
    return None


@pytest.mark.parametrize(
    "kind",
    ["bomb", "zero bytes", "symlink loop", "pipe", "folder", "16 bits", "turned by EXIF", "CMYK", "palette",
     "RGBA"],
)  # fmt: skip
def test_strange_photos_are_read_or_refused_with_a_message(config, tiny_weights, data, capsys, kind):
    expected = spoil_photo(data, kind)
    assert run_tiny(config, tiny_weights, "-e", 1) == (2 if expected else 0)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if expected:
        assert expected in error and not Path("exp").exists()


def test_photo_and_mask_turned_alike_by_exif_are_a_pair(config, tiny_weights, data):
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("imgs", "masks"):
        path = data / "cables" / kind / "0.png"
        Image.open(path).save(path, exif=exif)
    assert run_tiny(config, tiny_weights, "-e", 1) == 0


@pytest.mark.parametrize("name", ["a b", "ünï", "line\nbreak", "-e", "$HOME;ls", "%s{0}"])
def test_strange_names_are_names(config_file, tiny_weights, data, name):
    (data / "cables").rename(data / name)
    for kind in ("imgs", "masks"):
        (data / name / kind / "0.png").rename(data / name / kind / f"{name}.png")
    assert run_tiny(config_file(data_dir=name), tiny_weights, "-e", 1) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dataset: !!python/object/apply:os.mkdir [pwned]", "is not valid YAML"),
        ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n" for last, name in pairwise("abcdefgh")
        ), "a: unknown key"),
        ("[" * 900_000, "cannot read"),
    ],
)  # fmt: skip
def test_hostile_yaml(config, tiny_weights, capsys, text, expected):
    config.write_text(text)
    assert run_tiny(config, tiny_weights) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error and len(error) < 2000
    assert not Path("pwned").exists() and not Path("exp").exists()


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", "", ".hidden", "a\nb", "a\0b"])
def test_results_never_leave_exp(config, tiny_weights, capsys, name):
    before = sorted(Path().rglob("*"))
    assert run_tiny(config, tiny_weights, "-n", name) == 2
    assert "expected the name of a folder inside exp/" in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def spoil_weights(path, kind):
    if kind == "code":
        torch.save({"model": Hostile()}, path)
        return "is refused"
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:-5000])
        return "is it truncated?"
    weights = checkpoint.load_weights(path)
    weights["mask_decoder.iou_token.weight"] = torch.zeros(1, 7)
    checkpoint.save_weights(weights, path)
    return "does not hold the weights of tiny"


@pytest.mark.parametrize("kind", ["code", "cut off", "another shape"])
def test_hostile_checkpoints_run_no_code(config, tiny_weights, capsys, kind):
    expected = spoil_weights(tiny_weights, kind)
    assert run_tiny(config, tiny_weights) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error
    assert not Path("pwned").exists() and not Path("exp").exists()


# --- what a resumed run rests on ---


def test_other_weights_under_the_same_path_are_refused(config, tiny_weights, capsys):
    assert run_tiny(config, tiny_weights, *FLAGS, "-e", 1) == 0
    weights = checkpoint.load_weights(tiny_weights)
    weights["image_encoder.pos_embed"] += 1
    checkpoint.save_weights(weights, tiny_weights)
    assert run_tiny(config, tiny_weights, *FLAGS, "-e", 2, "--resume") == 1
    assert "is not the weights file that the run started from" in capsys.readouterr().err


def test_another_precision_of_auto_is_refused(config, tiny_weights, monkeypatch, capsys):
    auto = (*FLAGS, "--amp", "auto")
    monkeypatch.setattr(runtime, "amp_dtype", lambda choice, device: torch.bfloat16)
    assert run_tiny(config, tiny_weights, *auto, "-e", 1) == 0
    monkeypatch.setattr(runtime, "amp_dtype", lambda choice, device: None)
    assert run_tiny(config, tiny_weights, *auto, "-e", 2, "--resume") == 1
    assert "add --amp bf16" in capsys.readouterr().err


def test_a_run_that_died_before_its_first_state_starts_again(config, tiny_weights, whole_run, capsys):
    process = run_forked(*apart(config, tiny_weights), KILL_IN=3)
    assert process.returncode == -signal.SIGKILL and not Path("exp/run/resume.pth").exists()
    assert run_tiny(config, tiny_weights, *FLAGS) == 2
    assert "add --resume" in capsys.readouterr().err
    assert run_tiny(config, tiny_weights, *FLAGS, "--resume") == 0
    assert "resumed     from the start" in capsys.readouterr().out
    assert_same_results("exp/run", whole_run)


def test_a_run_that_is_done_is_not_resumed_without_more_epochs(config, tiny_weights, capsys):
    assert run_tiny(config, tiny_weights, *FLAGS, "-e", 2) == 0
    for epochs in (1, 2):
        assert run_tiny(config, tiny_weights, *FLAGS, "-e", epochs, "--resume") == 2
        assert "give a larger --epoch_num" in capsys.readouterr().err
    assert run_tiny(config, tiny_weights, *FLAGS, "-e", 3, "--resume") == 0


def test_a_run_is_trained_by_one_process_at_a_time(config, tiny_weights, capsys):
    assert run_tiny(config, tiny_weights, *FLAGS, "-e", 1) == 0
    with resume.locked(Path("exp/run")):
        process = run_forked(*apart(config, tiny_weights, "-e", 2, "--resume"))
    assert process.returncode == 1
    assert "another process is training this run" in process.stderr and "Traceback" not in process.stderr
    assert "to continue" not in process.stderr
    assert run_tiny(config, tiny_weights, *FLAGS, "-e", 2, "--resume") == 0
    assert not Path("exp/run/.lock").exists()


@pytest.mark.parametrize("spoil", ["nothing", "none", "shape"])
def test_a_spoiled_state_is_refused(config, tiny_weights, capsys, spoil):
    assert run_tiny(config, tiny_weights, *FLAGS, "-e", 1) == 0
    path = Path("exp/run/resume.pth")
    state = torch.load(path, weights_only=True)
    state["weights"]["mask_decoder.iou_token.weight"] = torch.zeros(3, 3)
    torch.save({"nothing": {}, "none": None, "shape": state}[spoil], path)
    assert run_tiny(config, tiny_weights, *FLAGS, "-e", 2, "--resume") == (1 if spoil == "shape" else 2)
    assert "start the run again" in capsys.readouterr().err


def test_too_many_bad_steps_end_a_run_whose_limit_was_lowered(config, tiny_weights, at_iteration, capsys):
    at_iteration(range(1, 99), spoil)
    assert run_tiny(config, tiny_weights, *FLAGS, "--max_bad_steps", 99, "-e", 1) == 0
    at_iteration(range(1, 99), spoil)
    assert run_tiny(config, tiny_weights, *FLAGS, "--max_bad_steps", 2, "--resume") == 1
    assert "not finite in 4 steps in a row" in capsys.readouterr().err


# --- data workers ---


def test_data_workers_that_do_not_answer_end_the_run(config, tiny_weights, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "WORKER_TIMEOUT", 1)
    monkeypatch.setattr(finetune, "training_cable_width", lambda train_set: None)
    monkeypatch.setattr(dataset.TrainSet, "_make", lambda self, key: time.sleep(60))
    assert run_tiny(config, tiny_weights, *FLAGS, "--num_workers", 1) == 1
    error = capsys.readouterr().err
    assert "no data came from the data workers for 1 s" in error and "--num_workers 0" in error


def test_data_workers_that_cannot_be_started_end_the_run(config, tiny_weights, monkeypatch, capsys):
    launch, calls = popen_fork.Popen._launch, []

    def fail_in_third(self, process):
        calls.append(process)
        if len(calls) == 3:  # the first is of the test set
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return launch(self, process)

    monkeypatch.setattr(popen_fork.Popen, "_launch", fail_in_third)
    assert run_tiny(config, tiny_weights, *FLAGS, "--num_workers", 2) == 1
    assert "use fewer --num_workers" in capsys.readouterr().err
    assert len(calls) == 3 and multiprocessing.active_children() == []


def test_too_little_shared_memory_is_named(config, tiny_weights, monkeypatch, capsys):
    disk_usage = shutil.disk_usage
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: (
            disk_usage(path)._replace(free=100) if path == dataset.SHARED_MEMORY else disk_usage(path)
        ),
    )
    assert run_tiny(config, tiny_weights, *FLAGS, "--num_workers", 1) == 1
    assert "--shm-size" in capsys.readouterr().err
    assert run_tiny(config, tiny_weights, *FLAGS, "-n", "other", "--num_workers", 0, "-e", 1) == 0


def test_the_newest_checkpoints_are_those_of_the_largest_epochs(tmp_path):
    for epoch in (9998, 9999, 10000, 10001):
        (tmp_path / f"epoch_{epoch:04d}.pth").touch()
    checkpoint.remove_old_checkpoints(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch_10000.pth", "epoch_10001.pth"}
