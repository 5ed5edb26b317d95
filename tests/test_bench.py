"""The benchmark command: wrong flags, and platforms without `resource`."""

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
