"""predict.py: the real command on drawn cables."""

import csv
import json

import cv2
import numpy as np
import pytest
import torch
from conftest import write_dataset, write_video
from PIL import Image
from segment_anything import SamPredictor

import checkpoint
import predict
from imaging.files import read_image
from imaging.masks import read_mask
from imaging.metrics import GroundTruth, score


@pytest.fixture
def trained(tiny_weights, tiny_sam):
    """Weights that find some cable pixels and miss others."""
    with torch.no_grad():
        for parameter in tiny_sam.mask_decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(3)) * 0.05)
    checkpoint.save_weights(tiny_sam.state_dict(), tiny_weights)
    return tiny_weights


def run(weights, source, output, *argv):
    flags = (
        "--checkpoint",
        weights,
        "--input",
        source,
        "--output",
        output,
        "--device",
        "cpu",
        "--amp",
        "off",
    )
    return predict.main([str(part) for part in (*flags, *argv)])


def test_a_folder_gives_sam_predictors_masks_and_their_measures(trained, tiny_sam, data, tmp_path, capsys):
    write_dataset(tmp_path / "wide", 2, size=(40, 100), seed=2)  # sizes differ within a batch
    for kind in ("imgs", "masks"):
        for file in (tmp_path / "wide" / kind).iterdir():
            file.rename(data / "test" / kind / f"wide {file.name}")
    photos, masks = data / "test/imgs", data / "test/masks"
    assert run(trained, photos, tmp_path / "out", "--masks", masks, "--batch_size", 2) == 0
    predictor = SamPredictor(tiny_sam)
    ious = []
    for path in sorted(photos.iterdir()):
        predictor.set_image(read_image(path))
        official = predictor.predict(multimask_output=False)[0][0]
        with Image.open(tmp_path / f"out/masks/{path.stem}.png") as file:
            ours = np.asarray(file)
        assert set(np.unique(ours)) == {0, 255}  # neither empty nor full, or this test shows nothing
        assert np.mean((ours == 255) != official) < 0.002
        assert read_image(tmp_path / f"out/overlays/{path.stem}.jpg").shape == (*ours.shape, 3)
        ious.append(score(ours == 255, GroundTruth.from_mask(read_mask(masks / path.name))).iou)
    speed, *table, of_the_set = capsys.readouterr().out.splitlines()
    assert speed.startswith("5 images, ") and "images/s" in speed
    assert of_the_set.startswith("total_iou 0.1") and "recall_thin" in of_the_set
    assert len(ious) == 5 and len(table) == 7
    assert table[-1].split()[:2] == ["mean", f"{np.mean(ious):.4f}"]
    assert table[0].split()[1:] == ["iou", "dice", "precision", "recall", "boundary_iou", "cldice"]
    assert float(table[1].split()[-6]) == pytest.approx(min(ious), abs=1e-4)  # the worst comes first
    with (tmp_path / "out/measures.csv").open(newline="") as file:
        written = [(row["picture"], float(row["iou"])) for row in csv.DictReader(file)]
    assert [iou for _, iou in written] == pytest.approx(sorted(ious))
    assert {stem for stem, _ in written} == {path.stem for path in photos.iterdir()}
    assert read_image(tmp_path / "out/worst.jpg").shape[1] == 960


def test_unreadable_images_are_listed_and_the_rest_predicted(trained, data, tmp_path, capsys):
    (data / "test/imgs/0.png").write_bytes(b"not an image")
    assert run(trained, data / "test/imgs", tmp_path / "out") == 1
    assert "0.png: cannot be decoded" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out/masks").iterdir()) == ["1.png", "2.png"]


def test_a_single_image(trained, data, tmp_path):
    assert run(trained, data / "test/imgs/1.png", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out/masks").iterdir()] == ["1.png"]


def test_probabilities_polygons_and_another_threshold(trained, data, tmp_path):
    flags = ("--probabilities", "--polygons", "--threshold", 0.01)
    assert run(trained, data / "test/imgs", tmp_path / "out", *flags) == 0
    document = json.loads((tmp_path / "out/polygons.json").read_text())
    assert [image["file_name"] for image in document["images"]] == ["0.png", "1.png", "2.png"]
    for number, stem in enumerate("012", 1):
        mask = read_mask(tmp_path / f"out/masks/{stem}.png")
        with Image.open(tmp_path / f"out/probabilities/{stem}.png") as file:
            probabilities = np.asarray(file) / 65535
        least = 1 / (1 + np.exp(-0.01))
        clear = np.abs(probabilities - least) > 1e-5  # what is not rounded to it
        np.testing.assert_array_equal((probabilities > least)[clear], mask[clear])
        assert clear.mean() > 0.99
        parts = [part["area"] for part in document["annotations"] if part["image_id"] == number]
        assert sum(parts) == mask.sum() > 0
    with_zero = tmp_path / "zero"
    assert run(trained, data / "test/imgs", with_zero) == 0
    assert read_mask(with_zero / "masks/0.png").sum() > read_mask(tmp_path / "out/masks/0.png").sum()


def test_prompts_reach_the_decoder(trained, data, tmp_path, capsys):
    (tmp_path / "boxes.csv").write_text("image,x1,y1,x2,y2\n0.png,0,0,10,10\n1.png,0,0,40,40\n")
    assert run(trained, data / "test/imgs", tmp_path / "out", "--prompt", tmp_path / "boxes.csv") == 2
    assert "no prompt for 2.png" in capsys.readouterr().err
    with (tmp_path / "boxes.csv").open("a") as file:
        file.write("2.png,5,5,60,40\n")
    assert run(trained, data / "test/imgs", tmp_path / "out", "--prompt", tmp_path / "boxes.csv") == 0
    assert run(trained, data / "test/imgs", tmp_path / "none") == 0
    with_box, without = (read_mask(tmp_path / f"{name}/masks/1.png") for name in ("out", "none"))
    assert (with_box != without).any()


def test_tiles_see_more_of_a_large_image(trained, data, tmp_path):
    photo = cv2.resize(read_image(data / "test/imgs/1.png"), (320, 240), interpolation=cv2.INTER_NEAREST)
    Image.fromarray(photo).save(tmp_path / "large.png")
    assert run(trained, tmp_path / "large.png", tmp_path / "out", "--tiles", 64, "--batch_size", 3) == 0
    assert run(trained, tmp_path / "large.png", tmp_path / "whole") == 0
    tiled, whole = (read_mask(tmp_path / f"{name}/masks/large.png") for name in ("out", "whole"))
    assert tiled.shape == whole.shape == (240, 320) and (tiled != whole).any()
    with pytest.raises(SystemExit):
        run(trained, tmp_path / "large.png", tmp_path / "no", "--tiles", 64, "--prompt", "p.csv")


def test_a_video_gives_a_mask_a_frame_and_a_video(trained, data, tmp_path):
    frames = [read_image(data / f"cables/imgs/{number}.png") for number in range(6)]
    write_video(tmp_path / "clip.avi", frames)
    assert run(trained, tmp_path / "clip.avi", tmp_path / "out", "--polygons") == 0
    masks = sorted(path.name for path in (tmp_path / "out/masks").iterdir())
    assert masks == [f"clip_{number:06d}.png" for number in range(6)]
    assert run(trained, tmp_path / "clip.avi", tmp_path / "no", "--masks", data / "test/masks") == 2
    made = cv2.VideoCapture(str(tmp_path / "out/overlays/clip.mp4"))
    assert made.get(cv2.CAP_PROP_FRAME_COUNT) == 6 and made.get(cv2.CAP_PROP_FPS) == 5
    is_read, first = made.read()
    assert is_read and first.shape == frames[0].shape
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("tmp")] == []


def test_a_damaged_video_is_named(trained, data, tmp_path, capsys):
    frames = [read_image(data / f"cables/imgs/{number}.png") for number in range(6)] * 5
    write_video(tmp_path / "clip.avi", frames)
    content = (tmp_path / "clip.avi").read_bytes()
    (tmp_path / "clip.avi").write_bytes(content[: len(content) // 2])
    (tmp_path / "none.mp4").write_bytes(b"not a video")
    assert run(trained, tmp_path / "clip.avi", tmp_path / "out") == 1
    assert "clip.avi: of " in capsys.readouterr().err
    assert run(trained, tmp_path / "none.mp4", tmp_path / "out2") == 1
    assert "none.mp4: of 0 frames only 0 can be decoded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"), [("--batch_size", "0"), ("--batch_size", "two"), ("--tiles", "15")]
)
def test_a_flag_out_of_range_is_refused(trained, data, tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit):
        run(trained, data / "test/imgs", tmp_path / "out", flag, value)
    assert f"argument {flag}: expected a whole number of at least" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("checkpoint", "checkpoint not found"),
        ("variant", "holds weights of none of vit_b"),
        ("input", "no such file or folder"),
        ("empty", "no .png, .jpg, .jpeg, .webp, .tif, .tiff or .bmp file in it"),
        ("stems", "0.jpg and 0.png would give one mask"),
        ("masks", "no mask for 0.png"),
    ],
)
def test_mistakes_end_with_a_message(trained, data, tmp_path, capsys, fault, message):
    source, masks = data / "test/imgs", data / "test/masks"
    if fault == "checkpoint":
        trained.unlink()
    elif fault == "variant":
        checkpoint.save_weights({"resnet.conv1.weight": torch.zeros(3)}, trained)
    elif fault == "input":
        source = data / "nowhere"
    elif fault == "empty":
        source = data
    elif fault == "stems":
        (source / "0.jpg").write_bytes(b"")
    elif fault == "masks":
        (masks / "0.png").unlink()
    assert run(trained, source, tmp_path / "out", "--masks", masks) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_ends_with_a_message(trained, data, tmp_path, capsys):
    (tmp_path / "out").write_text("a file, not a folder")
    assert run(trained, data / "test/imgs", tmp_path / "out") == 2
    assert f"error: --output {tmp_path / 'out'}: cannot be created" in capsys.readouterr().err
