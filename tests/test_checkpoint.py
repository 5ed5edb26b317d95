"""Saved weights, and what a resumed run takes from the files of the run."""

import errno
import os
import pickle
import shlex
import signal
from pathlib import Path

import pytest
import torch
import yaml
from conftest import draw_cable, rng, run_finetune, run_tiny, write_dataset
from PIL import Image
from safetensors.torch import save_file

import checkpoint
from base.errors import UserError
from train_config import parse_args


def test_round_trip(tmp_path):
    state_dict = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.tensor(3)}
    checkpoint.save_weights(state_dict, tmp_path / "w.pth")
    loaded = checkpoint.load_weights(tmp_path / "w.pth")
    assert loaded.keys() == state_dict.keys()
    assert all(torch.equal(loaded[name], state_dict[name]) for name in state_dict)


class Hostile:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_code_in_a_checkpoint_is_not_run(tmp_path, save):
    save(Hostile(tmp_path / "ran"), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth is refused"):
        checkpoint.load_weights(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 10, 300, -30])
def test_a_truncated_checkpoint_is_named(tmp_path, keep):
    checkpoint.save_weights({"a": torch.zeros(100)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cut\.pth"):
        checkpoint.load_weights(tmp_path / "cut.pth")


@pytest.mark.parametrize("keep", [1, 18])  # PyTorch raises IndexError and struct.error
def test_a_truncated_checkpoint_of_the_old_format_is_named(tmp_path, keep):
    torch.save({"a": torch.zeros(100)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:keep])
    with pytest.raises(UserError, match=r"w\.pth cannot be read as a checkpoint; is it truncated"):
        checkpoint.load_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "content", [[1, 2], {"model": {"a": 1}}, {"epoch": 3}, {"weights": {"a": torch.zeros(1)}}, torch.zeros(3)]
)
def test_what_is_no_plain_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w.pth is not a plain state_dict .* torch.save"):
        checkpoint.load_weights(tmp_path / "w.pth")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.pth"):
        checkpoint.load_weights(tmp_path / "gone.pth")


# --- Checkpoints of other tools ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrapper", "prefix", "others"),
    [
        ("model", "", {}),  # MedSAM's training
        ("model", "module.", {}),  # with DistributedDataParallel
        (None, "module.", {"n_averaged": torch.tensor(3)}),  # torch.optim.swa_utils.AveragedModel
        ("state_dict", "model.", {"loss.weight": torch.ones(2)}),  # Lightning
        ("state_dict", "model.sam.", {"model.head.weight": torch.ones(2)}),
        ("state_dict", "sam.", {}),
        ("model_state_dict", "_orig_mod.", {}),  # torch.compile
    ],
)
def test_weights_in_the_dict_of_a_training_loop_are_taken_out(tmp_path, tiny_sam, wrapper, prefix, others):
    state_dict = tiny_sam.state_dict()
    content = {f"{prefix}{name}": weight for name, weight in state_dict.items()} | others
    if wrapper:
        content = {"epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, wrapper: content}
    torch.save(content, tmp_path / "w.pth")
    weights = checkpoint.load_weights(tmp_path / "w.pth")
    assert weights.keys() == state_dict.keys()
    assert all(torch.equal(weights[name], state_dict[name]) for name in weights)


def test_one_of_several_models_is_not_guessed(tmp_path, tiny_sam):
    state_dict = tiny_sam.state_dict()
    content = {f"{model}.{name}": w for model in ("teacher", "student") for name, w in state_dict.items()}
    torch.save({"state_dict": content}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"several models, with the prefixes teacher\., student\."):
        checkpoint.load_weights(tmp_path / "w.pth")


def test_a_state_to_resume_names_the_weights_to_give(tmp_path):
    (tmp_path / "run").mkdir()
    state = {key: {} for key in checkpoint.ResumeState.__required_keys__}
    torch.save(state, tmp_path / "run/resume.pth")
    with pytest.raises(UserError, match=r"state for --resume, .* give .*run/checkpoints/last\.pth"):
        checkpoint.load_weights(tmp_path / "run/resume.pth")


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), OSError(errno.EIO, "bad disk")])
@pytest.mark.parametrize("load", [checkpoint.load_resume_state, checkpoint.load_weights])
def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch, load, error):
    def fail(*_, **__):
        raise error

    path = tmp_path / "resume.pth"
    path.touch()
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError) as raised:
        load(path)
    assert str(raised.value) == f"{path} cannot be read: {error}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"checkpoint not found: .*model\.safetensors; expected a \.pth file or a folder of SamModel"),
        ({"a": torch.zeros(2)}, "does not hold the weights of a SamModel"),
        (b"cut off", "cannot be read as safetensors"),
    ],
)
def test_a_folder_that_is_no_sam_model_is_refused(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        save_file(content, path)
    with pytest.raises(UserError, match=message):
        checkpoint.load_weights(tmp_path)


def test_a_model_that_was_saved_whole_is_refused_with_the_way_out(tmp_path, tiny_sam):
    torch.save({"model": tiny_sam}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth is refused: .* torch\.save\(model\.state_dict\(\), PATH\)"):
        checkpoint.load_weights(tmp_path / "w.pth")


# --- resuming ---

FLAGS = ("-b", 2, "--lr", 1e-2, "--prompt", "mixed", "--test_interval", 4, "--seed", 3)


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def last_weights(name):
    return checkpoint.load_weights(Path(f"exp/{name}/checkpoints/last.pth"))


def test_the_printed_command_resumes_with_the_files_of_the_run(
    tiny_weights, config_file, in_tmp_path, at_iteration, capsys
):
    config = config_file()
    assert run_tiny(config, tiny_weights, *FLAGS, "-e", 3, "-n", "whole") == 0
    at_iteration(5, lambda batch, net: os.kill(os.getpid(), signal.SIGTERM))
    assert run_tiny(config, tiny_weights, *FLAGS, "-e", 3) == 143
    config.unlink()
    _, command = capsys.readouterr().err.rstrip().split("to continue: ")
    _, script, *argv = shlex.split(command)
    assert Path(script).name == "finetune.py" and argv == ["--exp_name", "run", "--resume"]
    assert run_finetune(*argv) == 0
    assert "resumed     after iteration 5" in capsys.readouterr().out
    whole, resumed = last_weights("whole"), last_weights("run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_whose_folder_was_renamed_goes_on(tiny_weights, config_file, in_tmp_path):
    assert run_tiny(config_file(), tiny_weights, *FLAGS, "-e", 1) == 0
    Path("exp/run").rename("exp/renamed")
    assert run_finetune("--exp_name", "renamed", "--resume", "-e", 2) == 0
    assert not Path("exp/run").exists() and Path("exp/renamed/checkpoints/last.pth").exists()


def test_flags_of_a_resumed_run_come_from_its_files_and_then_from_the_command(
    tiny_weights, config_file, in_tmp_path, capsys
):
    assert run_tiny(config_file(), tiny_weights, *FLAGS, "-e", 1, "--grad_checkpointing") == 0
    config = parse_args(["--resume", "--exp_name=run", "--log_interval", "3", "-e", "2"])
    assert (config.lr, config.seed, config.num_workers, config.prompt) == (1e-2, 3, 0, "mixed")
    assert config.grad_checkpointing and config.keep_last is None and config.resume
    assert (config.log_interval, config.epoch_num) == (3, 2)
    assert (config.checkpoint, config.config) == (tiny_weights, Path("exp/run/config.yaml"))
    assert run_finetune("--resume", "-n", "run", "-e", 2, "--lr", 7) == 2
    assert "--lr: was 0.01, is now 7.0" in capsys.readouterr().err
    Path("exp/run/args.yaml").write_text("- no flags")
    assert run_finetune("--resume", "-n", "run") == 2
    assert "exp/run/args.yaml: expected the flags of the run" in capsys.readouterr().err
    assert run_finetune("--resume", "-n", "nothing") == 2
    assert "exp/nothing: there is no such run to resume" in capsys.readouterr().err


def test_a_run_goes_on_with_data_and_weights_that_were_moved(
    tiny_weights, config_file, in_tmp_path, data, capsys
):
    config = config_file()
    assert run_tiny(config, tiny_weights, *FLAGS, "-e", 1) == 0
    for name in ("cables", "test", "backgrounds"):
        (data / name).rename(data / f"moved {name}")
    assert run_finetune("--resume", "-n", "run", "-e", 2) == 2
    error = capsys.readouterr().err
    assert "no such folder" in error and "If the data was moved, give --config" in error
    document = yaml.safe_load(config.read_text())
    train = document["dataset"]["train"][0]
    train |= {"data_dir": "moved cables", "bg_paths": ["moved backgrounds"]}
    document["dataset"]["test"]["data_dir"] = "moved test"
    (data / "new.yaml").write_text(yaml.safe_dump(document))
    weights = tiny_weights.rename(tiny_weights.with_name("moved.pth"))
    argv = ("--resume", "-n", "run", "-e", 2, "--config", data / "new.yaml", "--checkpoint", weights)
    assert run_finetune(*argv) == 0
    assert "resumed     after iteration 3" in capsys.readouterr().out
    train["bg_paths"] *= 2
    document["dataset"]["train"].append(train)
    (data / "new.yaml").write_text(yaml.safe_dump(document))
    assert run_finetune(*argv[:-2], "-e", 3) == 2
    error = capsys.readouterr().err
    assert "dataset.train[0].bg_paths: was 1 folder(s), is now 2 folder(s)" in error
    assert f"dataset.train[1]: was missing, is now {data}/moved cables" in error and "{" not in error


def test_photos_that_were_added_or_removed_are_named_with_the_way_on(
    tiny_weights, config_file, in_tmp_path, data, capsys
):
    assert run_tiny(config_file(), tiny_weights, *FLAGS, "-e", 1) == 0
    write_dataset(data / "new", 1, seed=5)
    for kind in ("imgs", "masks"):
        (data / f"new/{kind}/0.png").rename(data / f"cables/{kind}/extra.png")
        (data / f"test/{kind}/1.png").unlink()
    Image.fromarray(draw_cable(rng(7), (48, 64), 5)).save(data / "cables/masks/2.png")
    capsys.readouterr()
    assert run_finetune("--resume", "-n", "run", "-e", 2) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:-1] == [
        "  changed: dataset 1: masks/2",
        "  added: dataset 1: imgs/extra",
        "  added: dataset 1: masks/extra",
        "  removed: dataset 2: imgs/1",
        "  removed: dataset 2: masks/1",
    ]
    assert lines[-1].endswith("another --exp_name and --checkpoint exp/run/checkpoints/last.pth.")


def test_the_folder_of_a_run_and_an_onnx_file_name_the_weights_to_give(tmp_path, tiny_weights):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    weights = tiny_weights.rename(tmp_path / "run/checkpoints/best.pth")
    with pytest.raises(UserError, match=f"give {weights}"):
        checkpoint.load_weights(tmp_path / "run")
    (tmp_path / "cables.onnx").write_bytes(b"graph")
    with pytest.raises(UserError, match=r"cables\.onnx is an ONNX file; give the \.pth file"):
        checkpoint.load_weights(tmp_path / "cables.onnx")


def test_a_lock_file_that_cannot_be_removed_ends_no_run(tmp_path, monkeypatch):
    def refuse(path, missing_ok=False):
        raise PermissionError(errno.EACCES, "open in another program", str(path))

    with monkeypatch.context() as patch, checkpoint.locked(tmp_path):
        patch.setattr(Path, "unlink", refuse)
    with checkpoint.locked(tmp_path):  # it was released
        pass
