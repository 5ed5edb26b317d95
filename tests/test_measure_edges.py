"""tools/measure_edges.py: the distance between the edge of masks and the visible edge."""

import cv2
import numpy as np
import pytest
from PIL import Image

from tools import measure_edges as tool


def write_band(folder, name, *, narrower=0, width=20, color=(200, 40, 40)):
    """A blurred band of `width` pixels on gray; the edges of its mask lie `narrower` pixels inside it."""
    image, mask = np.full((120, 160, 3), 90, np.uint8), np.zeros((120, 160), np.uint8)
    image[40 : 40 + width] = color
    mask[40 + narrower : 40 + width - narrower] = 255
    for part, values in (("imgs", cv2.GaussianBlur(image, (0, 0), 1)), ("masks", mask)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(folder / part / f"{name}.png")
    return folder


def row_of(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return line.removeprefix(name).split()


@pytest.mark.parametrize("narrower", [-1, 0, 2])
def test_the_visible_edge_is_found_where_the_color_changes(tmp_path, capsys, narrower):
    assert tool.main(["--data", str(write_band(tmp_path, "a", narrower=narrower))]) == 0
    images, _, edge = row_of(capsys.readouterr().out, "masks ")
    assert images == "1" and float(edge) == pytest.approx(narrower, abs=0.2)


def test_predictions_are_scored_against_masks_whose_edge_moves(tmp_path, capsys):
    data = write_band(tmp_path / "data", "a", narrower=2)  # 16 rows
    exact = write_band(tmp_path / "exact", "a")  # 20 rows
    argv = ["--data", str(data), "--predictions", str(exact / "masks"), "--move", "2"]
    assert tool.main(argv) == 0
    text = capsys.readouterr().out
    assert float(row_of(text, "predictions ")[-1]) == pytest.approx(0, abs=0.2)
    assert row_of(text, "masks as they are") == ["0.800", "0.800", "1.000"]
    assert row_of(text, "masks moved by +2.0 px") == ["1.000", "1.000", "1.000"]


def test_an_image_without_a_prediction_is_named(tmp_path, capsys):
    data = write_band(write_band(tmp_path / "data", "a"), "b")
    exact = write_band(tmp_path / "exact", "a")
    assert tool.main(["--data", str(data), "--predictions", str(exact / "masks")]) == 2
    assert "b.png: has no mask in" in capsys.readouterr().err


def test_a_prediction_of_another_size_is_named(tmp_path, capsys):
    data, other = write_band(tmp_path / "data", "a"), tmp_path / "other"
    other.mkdir()
    Image.new("L", (80, 60)).save(other / "a.png")
    assert tool.main(["--data", str(data), "--predictions", str(other)]) == 2
    assert "a.png: is (60, 80) but" in capsys.readouterr().err


def test_an_empty_mask_counts_no_place(tmp_path, capsys):
    data = write_band(write_band(tmp_path, "a"), "b")
    Image.new("L", (160, 120)).save(data / "masks/b.png")
    assert tool.main(["--data", str(data)]) == 0
    assert row_of(capsys.readouterr().out, "masks ")[0] == "1"


@pytest.mark.parametrize("band", [{"width": 3}, {"color": (92, 92, 92)}])
def test_cables_whose_edge_cannot_be_measured_are_reported(tmp_path, capsys, band):
    assert tool.main(["--data", str(write_band(tmp_path, "a", **band))]) == 2
    assert "7 pixels wide" in capsys.readouterr().err
