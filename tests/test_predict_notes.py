"""predict.py: what it says while it predicts, and inputs without a single image."""

import json
import struct
from functools import partial

import numpy as np
import pytest
from conftest import write_video
from PIL import Image
from tqdm import tqdm

import inference
import predict
from imaging import media
from sidecar import Sidecar, write_sidecar


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


def test_a_header_that_claims_billions_of_frames_is_not_believed(tiny_weights, tmp_path, capsys):
    write_video(tmp_path / "clip.avi", [np.zeros((48, 64, 3), np.uint8)] * 2)
    content = bytearray((tmp_path / "clip.avi").read_bytes())
    struct.pack_into("<I", content, content.index(b"strh") + 40, 2_000_000_000)
    (tmp_path / "clip.avi").write_bytes(content)
    assert media.frame_count(tmp_path / "clip.avi") == 2_000_000_000
    assert run(tiny_weights, tmp_path / "clip.avi", tmp_path / "out") == 1
    assert "of 2000000000 frames that its header states, 2 can be decoded" in capsys.readouterr().err
    files = json.loads((tmp_path / "out/predictions.json").read_text())["files"]
    assert sorted(files)[:2] == ["masks/clip_000000.png", "masks/clip_000001.png"] and len(files) == 5


def test_a_prompt_outside_of_its_image_ends_the_command_before_it_writes(
    tiny_weights, data, tmp_path, capsys
):
    (tmp_path / "p.csv").write_text("image,x,y\n0.png,5,6\n1.png,900,6\n2.png,5,6\n")
    assert run(tiny_weights, data / "test/imgs", tmp_path / "out", "--prompt", tmp_path / "p.csv") == 2
    error = capsys.readouterr().err
    assert "line 3: point (900, 6) in 1.png, which is 64 px wide and 48 px high" in error
    assert not (tmp_path / "out").exists()


def test_the_speed_is_printed_also_without_a_progress_bar(tiny_weights, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "tqdm", partial(tqdm, disable=True))  # as with TQDM_DISABLE=1
    assert run(tiny_weights, data / "test/imgs", tmp_path / "out") == 0
    assert "3 images, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("trained_with", "with_file", "warning"),
    [
        ("box", False, "was trained with --prompt box, and there are no prompts"),
        ("point", False, "was trained with --prompt point, and there are no prompts"),
        ("none", True, "was trained without prompts"),
        ("box", True, None),
        ("none", False, None),
        ("mixed", False, None),
    ],
)
def test_prompts_that_do_not_fit_the_training_are_warned_of(
    tiny_weights, data, tmp_path, capsys, recwarn, trained_with, with_file, warning
):
    write_sidecar(Sidecar(model_type="tiny", input_size=64, prompt=trained_with), tiny_weights)
    (tmp_path / "p.csv").write_text("image,x,y\n1.png,5,6\n")
    flags = ("--prompt", tmp_path / "p.csv") if with_file else ()
    assert run(tiny_weights, data / "test/imgs/1.png", tmp_path / "out", *flags) == 0
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if line.startswith("warning")]
    lines += [str(one.message) for one in recwarn if "was trained" in str(one.message)]
    assert len(lines) == (1 if warning else 0) and all(warning in line for line in lines)


def test_photos_that_are_not_read_are_counted_and_named(tiny_weights, data, tmp_path, capsys):
    photos = data / "test/imgs"
    assert run(tiny_weights, photos, tmp_path / "out") == 0
    assert "not read" not in capsys.readouterr().err
    for name in "abcd":
        (photos / f"{name}.heic").touch()
    assert run(tiny_weights, photos, tmp_path / "out") == 0
    line = (
        "note: 4 file(s) are not predicted, because their format is not read: a.heic, b.heic, c.heic, ...\n"
    )
    assert line in capsys.readouterr().err


def test_true_masks_that_may_be_inverted_are_named(tiny_weights, data, tmp_path, capsys):
    flags = (data / "test/imgs", tmp_path / "out", "--masks", data / "test/masks")
    assert run(tiny_weights, *flags) == 0
    assert "inverted" not in capsys.readouterr().err
    for name in ("1.png", "2.png"):
        path = data / "test/masks" / name
        with Image.open(path) as file:
            mask = np.asarray(file)
        Image.fromarray(255 - mask).save(path)
    assert run(tiny_weights, *flags) == 0
    line = f"more than half of 2 mask(s), e.g. {data / 'test/masks/1.png'}: are they inverted?\n"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tiles", "cable_width", "times"),
    [(64, 4, "7.8"), (300, 4, None), (64, 30, None), (64, None, None)],  # 500 px would fit
)
def test_tiles_that_are_far_too_small_are_named_with_the_size_that_fits(
    tiny_weights, tmp_path, monkeypatch, capsys, tiles, cable_width, times
):
    def by_brightness(net, images, prompts, **options):
        return [image.mean(axis=2, dtype=np.float32) - 100 for image in images]

    monkeypatch.setattr(inference, "predict_logits", by_brightness)
    write_sidecar(Sidecar(model_type="tiny", input_size=64, cable_width=cable_width), tiny_weights)
    (tmp_path / "photos").mkdir()
    for number in range(2):
        image = np.pad(np.full((32, 600, 3), 255, np.uint8), ((100, 168), (0, 0), (0, 0)))
        Image.fromarray(image).save(tmp_path / f"photos/{number}.png")
    assert run(tiny_weights, tmp_path / "photos", tmp_path / "out", "--tiles", tiles) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "in tiles of" in line]
    assert len(lines) == (1 if times else 0)
    if times:
        assert lines[0].startswith(f"warning: in tiles of 64 px, cables are about {times} times as wide")
        assert lines[0].endswith("--tiles 496 would fit")
