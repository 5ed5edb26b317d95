"""tools/measure_threshold.py: a threshold that is chosen on one half of the photos and used on the other."""

import numpy as np
import pytest
from conftest import write_dataset
from PIL import Image

from tools import measure_threshold as tool


def test_each_half_gets_the_threshold_of_the_other(tmp_path, capsys):
    """Above 2, or above -0.625 in the other half of the photos, a pixel is cable. Swapped, both are wrong."""
    write_dataset(tmp_path / "cables", 10)
    pairs, _ = tool.find_pairs(tmp_path / "cables")
    masks = [np.asarray(Image.open(pair.mask_path)) > 0 for pair in pairs]

    class Segmenter:
        threshold = -5.0  # below all logits

        def __init__(self):
            self.number = -1

        def logits(self, images):
            self.number += 1
            best = (2.0, -1.0)[self.number % 2]
            around = np.random.default_rng(0).uniform(best - 0.5, best, masks[0].shape)
            yield np.where(masks[self.number], best + 0.5, around).astype(np.float32)

    tool.measure(pairs, Segmenter())
    head, checkpoint, training, balanced, *thresholds = capsys.readouterr().out.splitlines()
    assert head.split()[1:] == ["iou", "dice", "precision", "recall", "boundary_iou", "cldice"]
    iou, _, precision, recall, *_ = map(float, checkpoint.split()[1:])
    share = np.mean([mask.mean() for mask in masks])
    assert recall == 1 and precision == iou == pytest.approx(share, abs=0.01)
    for row in (training, balanced):
        _, _, precision, recall, *_ = map(float, row.split()[1:])
        assert recall == 0.5 and precision == pytest.approx(share / 2, abs=0.01)
    assert thresholds[:2] == ["checkpoint  -5 and -5", "training    2 and -0.625"]


def test_a_checkpoint_is_measured(tiny_weights, tmp_path, capsys):
    write_dataset(tmp_path / "cables", 10)
    argv = ["--checkpoint", str(tiny_weights), "--data", str(tmp_path / "cables")]
    assert tool.main(argv) == 0
    _, checkpoint, *_ = capsys.readouterr().out.splitlines()
    segment = tool.inference.load(tiny_weights)
    ious = []
    for image, mask in map(tool.read_pair, tool.find_pairs(tmp_path / "cables")[0]):
        predicted = segment(image)
        ious.append((predicted & mask).sum() / (predicted | mask).sum())
    assert float(checkpoint.split()[1]) == pytest.approx(np.mean(ious), abs=6e-4)


@pytest.mark.parametrize(("n", "message"), [(9, "has 9 photos; two halves need at least 10"), (0, "imgs")])
def test_too_few_photos_are_named(tiny_weights, tmp_path, capsys, n, message):
    folder = tmp_path / "cables"
    if n:
        write_dataset(folder, n)
    assert tool.main(["--checkpoint", str(tiny_weights), "--data", str(folder)]) == 2
    assert message in capsys.readouterr().err
