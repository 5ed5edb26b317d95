"""--preview: the real command on drawn cables, and what it prints about them."""

import io
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import write_dataset
from PIL import Image

import finetune
from imaging.files import read_image
from imaging.masks import read_mask


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def preview(config, *argv):
    """Run `--preview` for the tiny SAM; no weights are needed."""
    return finetune.main(
        ["--config", str(config), "--model_type", "tiny", "--exp_name", "run", "--preview", *argv]
    )


def test_it_shows_every_dataset_and_trains_nothing(tiny_weights, config_file, data, capsys):
    config = config_file()
    document = yaml.safe_load(config.read_text())
    document["dataset"]["train"].append({"data_dir": "cables"})
    config.write_text(yaml.safe_dump(document))
    assert preview(config, "--prompt", "point") == 0
    files = {path.name for path in Path("exp/run").rglob("*") if path.is_file()}
    assert files == {"train_0.jpg", "train_1.jpg", "test.jpg"}
    output = capsys.readouterr().out
    assert output.count("6 pairs of 48 x 64 (h x w)") == 2 and "3 pairs of" in output
    shares = [
        np.mean([read_mask(path).mean() for path in (data / name / "masks").iterdir()])
        for name in ("cables", "cables", "test")
    ]
    shown = [float(found) / 100 for found in re.findall(r"foreground (\d+\.\d+)% of the pixels", output)]
    assert shown == pytest.approx(shares, abs=1e-4)
    # Cables are drawn 5 to 6 pixels wide, in photos of 64 where the model's mask has 32.
    medians = [float(found) for found in re.findall(r"cables are (\d\.\d) of these pixels wide", output)]
    assert output.count("the model draws masks of 32 x 32 pixels") == 3 and "cells" not in output
    assert medians == pytest.approx([2.8] * 3, abs=0.5)
    photos = read_image(Path("exp/run/preview/train_1.jpg"))
    assert photos.shape[1] == 1600
    red, green, blue = np.moveaxis(photos.astype(int), 2, 0)
    yellow = np.minimum(red, green) - blue > 100
    green = green - np.maximum(red, blue) > 60
    assert green.sum() > 500 and yellow.sum() > 50  # outlines and points
    for left in (0, 800):  # each image as it is, and beside it the same in dark gray
        image, outlined = photos[:, left : left + 400], photos[:, left + 400 : left + 800]
        assert np.median(image) > 1.5 * np.median(outlined)
        assert green[:, left + 400 : left + 800].any()
    same_name = [
        "--config",
        config,
        "--model_type",
        "tiny",
        "--checkpoint",
        tiny_weights,
        "--exp_name",
        "run",
    ]
    on_cpu = ["--device", "cpu", "--amp", "off", "--num_workers", 0, "--epoch_num", 1]
    assert finetune.main([str(part) for part in (*same_name, *on_cpu)]) == 0


def test_a_second_preview_leaves_only_its_own_sheets_and_the_files_of_the_user(tiny_weights, config_file):
    config = config_file()
    folder, users_files = Path("exp/run/preview"), {"train.jpg", "train_01.jpg", "train_1.png", "my_test.jpg"}
    document = yaml.safe_load(config.read_text())
    document["dataset"]["train"].append({"data_dir": "cables"})
    config.write_text(yaml.safe_dump(document))
    assert preview(config) == 0 and (folder / "train_1.jpg").exists()
    for name in users_files:
        (folder / name).touch()
    del document["dataset"]["train"][1], document["dataset"]["test"]
    config.write_text(yaml.safe_dump(document))
    assert preview(config) == 0
    assert {path.name for path in folder.iterdir()} == {"train_0.jpg"} | users_files


def test_it_warns_of_thin_cables_empty_masks_and_near_duplicates(tiny_weights, config_file, data, capsys):
    write_dataset(data / "thin", 4, size=(96, 128), width=2)
    Image.new("L", (128, 96)).save(data / "thin/masks/2.png")
    photo = cv2.GaussianBlur(read_image(data / "thin/imgs/1.png"), (0, 0), 0.8)
    Image.fromarray(np.clip(photo.astype(int) + 9, 0, 255).astype(np.uint8)).save(data / "test/imgs/0.png")
    Image.open(data / "thin/masks/1.png").save(data / "test/masks/0.png")
    assert preview(config_file(data_dir="thin")) == 0
    output = capsys.readouterr().out
    assert "1 of 4 masks checked are empty" in output and str(data / "thin/masks/2.png") in output
    assert "% of their length is thinner than 2 of these pixels" in output
    assert f"{data / 'test/imgs/0.png'} = {data / 'thin/imgs/1.png'}" in output
    assert "test/imgs/1.png" not in output


def test_photos_of_training_and_test_are_named_once(tiny_weights, config_file, data, capsys, recwarn):
    shutil.rmtree(data / "test")
    shutil.copytree(data / "cables", data / "test")
    assert preview(config_file()) == 0
    assert "look like training images" not in capsys.readouterr().out
    named = [str(warning.message) for warning in recwarn if "test/imgs/0.png" in str(warning.message)]
    assert len(named) == 1 and named[0].startswith("test images are also used in training")


def test_names_that_the_output_cannot_hold_are_written_as_codes(tiny_weights, config_file, data, monkeypatch):
    (data / "cables").rename(data / "電線")
    bytes_written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_written, "cp1252"))  # as on Windows
    assert preview(config_file(data_dir="電線")) == 0
    sys.stdout.flush()
    assert rb"\u96fb\u7dda" in bytes_written.getvalue()


def test_faults_in_the_data_end_with_a_message(tiny_weights, config_file, data, capsys):
    (data / "cables/masks/0.png").unlink()
    assert preview(config_file()) == 2
    assert "0.png: has no mask" in capsys.readouterr().err and not Path("exp").exists()
