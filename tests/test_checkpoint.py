import os
import pickle

import pytest
import torch

import checkpoint
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


@pytest.mark.parametrize("content", [[1, 2], {"model": {"a": torch.zeros(1)}}, torch.zeros(3)])
def test_what_is_no_plain_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="not a plain state_dict"):
        checkpoint.load_weights(tmp_path / "w.pth")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.pth"):
        checkpoint.load_weights(tmp_path / "gone.pth")
