"""The measurement of recall by the color of cables."""

import pytest
from conftest import write_dataset

from tools import measure_colors


def test_each_color_class_has_a_row(tiny_weights, tmp_path, capsys):
    write_dataset(tmp_path / "cables", 2)
    argv = ["--checkpoint", str(tiny_weights), "--data", str(tmp_path / "cables"), "--every", "1"]
    assert measure_colors.main([*argv, "--threshold=-100"]) == 0  # every pixel is cable
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["own", "colored", "black", "gray", "white"]
    for row in rows:
        recall, precision, iou = map(float, row.split()[1:])
        assert recall == 1 and precision == pytest.approx(iou, abs=0.001) and 0.02 < iou < 0.5


def test_a_wrong_folder_is_named(tiny_weights, tmp_path, capsys):
    assert measure_colors.main(["--checkpoint", str(tiny_weights), "--data", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err
