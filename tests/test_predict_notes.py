"""predict.py: what it says while it predicts, and inputs without a single image."""

from functools import partial

from tqdm import tqdm

import predict
from imaging import media


def run(weights, source, output, *argv):
    flags = ("--checkpoint", weights, "--input", source, "--output", output)
    return predict.main([str(part) for part in (*flags, "--device", "cpu", "--amp", "off", *argv)])


class EndedCamera:
    """A camera that was unplugged after it had been opened."""

    def get(self, key):
        return -1.0

    def read(self):
        return False, None


def test_a_camera_that_ends_before_its_first_frame_leaves_an_empty_list(
    tiny_weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(media, "require_video", lambda video: None)
    monkeypatch.setattr(media, "open_video", lambda source: EndedCamera())
    assert run(tiny_weights, 0, tmp_path / "out") == 0
    assert "0 images, 0.00 images/s" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["predictions.json"]


def test_the_speed_is_printed_also_without_a_progress_bar(tiny_weights, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "tqdm", partial(tqdm, disable=True))  # as with TQDM_DISABLE=1
    assert run(tiny_weights, data / "test/imgs", tmp_path / "out") == 0
    assert "3 images, " in capsys.readouterr().out
