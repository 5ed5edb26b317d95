"""Files of weights: what is loaded, what is refused, and which ones a run keeps."""

import errno
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
import resume
from base.errors import UserError


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


@pytest.mark.parametrize("name", ["w.pth", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 375042383\n",
            "a Git LFS pointer, not the weights: run git lfs pull",
        ),
        (b"\n\n<!DOCTYPE html>\n<html>", "a web page, not the weights: download them again"),
    ],
    ids=["lfs", "html"],
)
def test_a_text_in_the_place_of_weights_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        checkpoint.load_weights(path)
    assert str(raised.value) == f"{path} is {message}"


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
    state = {key: {} for key in resume.ResumeState.__required_keys__}
    torch.save(state, tmp_path / "run/resume.pth")
    with pytest.raises(UserError, match=r"state for --resume, .* give .*run/checkpoints/last\.pth"):
        checkpoint.load_weights(tmp_path / "run/resume.pth")


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), OSError(errno.EIO, "bad disk")])
@pytest.mark.parametrize("load", [resume.load_resume_state, checkpoint.load_weights])
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


def test_the_folder_of_a_run_and_an_onnx_file_name_the_weights_to_give(tmp_path, tiny_weights):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    weights = tiny_weights.rename(tmp_path / "run/checkpoints/best.pth")
    with pytest.raises(UserError, match=f"give {weights}"):
        checkpoint.load_weights(tmp_path / "run")
    (tmp_path / "cables.onnx").write_bytes(b"graph")
    with pytest.raises(UserError, match=r"cables\.onnx is an ONNX file; give the \.pth file"):
        checkpoint.load_weights(tmp_path / "cables.onnx")


# --- The best weights and those of epochs ------------------------------------------------------


def test_the_best_weights_outlive_a_disk_that_is_full(tmp_path):
    for name in ("best.pth", "best.json"):
        (tmp_path / name).write_text(name)
    checkpoint.keep_best(tmp_path, 6)
    checkpoint.remove_kept_best(tmp_path)  # a state fits on the disk, and the new best.pth does not
    assert (tmp_path / "best_at_6.pth").read_text() == "best.pth"
    checkpoint.restore_best(tmp_path, 6)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "best.pth": "best.pth", "best.json": "best.json",
    }  # fmt: skip


def test_checkpoints_that_the_user_copied_are_left_alone(tmp_path):
    copies = {"best_at_friday.pth", "epoch_0001_copy.pth"}
    for name in (*copies, "best.pth", "best_at_6.pth", "epoch_0001.pth", "epoch_0002.pth"):
        (tmp_path / name).touch()
    checkpoint.remove_kept_best(tmp_path)
    checkpoint.remove_old_checkpoints(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == copies | {"best.pth", "epoch_0002.pth"}
