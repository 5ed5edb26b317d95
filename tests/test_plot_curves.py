"""Plots never replace a file that is no plot."""

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from tools import plot_curves


@pytest.fixture
def run_folder(tmp_path):
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for iteration in range(3):
            writer.add_scalar("test/iou", 0.1 * iteration, iteration)
    return tmp_path / "run"


def test_a_plot_replaces_only_a_plot(run_folder, tmp_path, capsys):
    out = tmp_path / "curves.png"
    assert plot_curves.main([str(run_folder), "--out", str(out)]) == 0
    assert plot_curves.main([str(run_folder), "--out", str(out)]) == 0
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    content = (tmp_path / "photo.png").read_bytes()
    with pytest.raises(SystemExit) as stop:
        plot_curves.main([str(run_folder), "--out", str(tmp_path / "photo.png")])
    assert (
        stop.value.code == 2
        and "photo.png exists and is no PNG file of Matplotlib" in capsys.readouterr().err
    )
    assert (tmp_path / "photo.png").read_bytes() == content


@pytest.mark.parametrize(
    ("out", "message"), [("nowhere/a.png", "there is no folder"), ("a.jsonl", "is no image file")]
)
def test_a_plot_that_cannot_be_written_is_refused(run_folder, tmp_path, capsys, out, message):
    with pytest.raises(SystemExit):
        plot_curves.main([str(run_folder), "--out", str(tmp_path / out)])
    assert message in capsys.readouterr().err
