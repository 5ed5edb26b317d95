"""predict.py: the real command on drawn cables."""

import numpy as np
import pytest
import torch
from conftest import write_dataset
from PIL import Image
from segment_anything import SamPredictor

import checkpoint
import predict
from dataset import read_image, read_mask
from metrics import Truth, score


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
        ious.append(score(ours == 255, Truth.of(read_mask(masks / path.name))).iou)
    table = capsys.readouterr().out.splitlines()
    assert len(ious) == 5 and len(table) == 7
    assert table[-1].split()[:2] == ["mean", f"{np.mean(ious):.4f}"]
    assert table[0].split()[1:] == ["iou", "dice", "precision", "recall", "boundary_iou", "cldice"]
    assert float(table[1].split()[-6]) == pytest.approx(min(ious), abs=1e-4)  # the worst comes first
    assert read_image(tmp_path / "out/worst.jpg").shape[1] == 960


def test_unreadable_pictures_are_listed_and_the_rest_predicted(trained, data, tmp_path, capsys):
    (data / "test/imgs/0.png").write_bytes(b"no picture")
    assert run(trained, data / "test/imgs", tmp_path / "out") == 1
    assert "0.png: cannot be decoded" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out/masks").iterdir()) == ["1.png", "2.png"]


def test_a_single_picture(trained, data, tmp_path):
    assert run(trained, data / "test/imgs/1.png", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out/masks").iterdir()] == ["1.png"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("checkpoint", "checkpoint not found"),
        ("variant", "holds weights of none of vit_b"),
        ("input", "no such file or folder"),
        ("empty", "no .png, .jpg or .jpeg file in it"),
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
    assert "error: " in capsys.readouterr().err
