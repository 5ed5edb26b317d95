"""The benchmark command: wrong flags, a peer that is missing, and platforms without `resource`."""

import importlib.util
import math
import sys

import pytest

from tools import bench


def test_a_missing_config_is_named(tmp_path, capsys):
    missing = tmp_path / "nope.yaml"
    with pytest.raises(SystemExit) as ended:
        bench.main(["--config", str(missing), "--model_type", "lite_medsam"])
    assert ended.value.code == 2
    assert f"argument --config: there is no file {missing}" in capsys.readouterr().err


def test_memory_is_unknown_where_the_system_cannot_tell(monkeypatch):
    assert bench.peak_memory_gb() > 0
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert math.isnan(bench.peak_memory_gb())


def test_a_peer_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        bench.main(["--model_type", "vit_b", "--peer", "micro_sam"])
    assert ended.value.code == 2
    assert "micro_sam is not installed; install it with pip install micro_sam" in capsys.readouterr().err


def test_a_package_that_a_peer_lacks_is_named_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "micro_sam").mkdir()
    (tmp_path / "micro_sam/__init__.py").touch()
    (tmp_path / "micro_sam/training.py").write_text("import a_package_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(bench, "in_new_process", lambda measure, *args: measure(*args))
    assert bench.main(["--model_type", "vit_b", "--peer", "micro_sam"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "No module named 'a_package_that_is_missing'" in err


@pytest.mark.parametrize(("seconds", "served", "timed"), [(0, 2, 1), (math.inf, 5, 3)])
def test_the_loader_of_a_peer_ends_by_time_and_does_not_time_the_first_batch(seconds, served, timed):
    loader = bench.TimedLoader([0, 1, 2, 3, 4], device="cpu", seconds=seconds)
    assert len(list(loader)) == served
    assert loader.batches == timed and loader.elapsed > 0
