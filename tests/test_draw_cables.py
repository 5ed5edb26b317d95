"""Drawn datasets: legal for training, the same each time, of many widths; other files stay."""

import cv2
import numpy as np
import pytest
import yaml
from conftest import write_backgrounds

from config import load_config
from dataset_index import index_datasets
from imaging.compositing import composite
from tools import draw_cables


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def widths(mask):
    """Local widths in pixels at the center lines of a mask."""
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)
    ridge = (depth > 0.9) & (depth >= cv2.dilate(depth, np.ones((3, 3), np.uint8)))
    return 2 * depth[ridge]


def test_the_folder_is_a_legal_dataset_and_gives_composites(tmp_path):
    folder, backgrounds = tmp_path / "drawn", write_backgrounds(tmp_path / "backgrounds")
    assert draw_cables.main(["--out", str(folder), "--n", "4", "--size", "256"]) == 0
    train = {"data_dir": str(folder), "bg_paths": [str(backgrounds)], "w_aug": True}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"dataset": {"train": [train]}}))
    (index,) = index_datasets(load_config(tmp_path / "data.yaml").dataset.train)
    assert len(index.pairs) == 4 and index.notes() == [] and 0.005 < index.foreground < 0.5
    rng = np.random.default_rng(0)
    image, mask = composite(index.pairs, index.backgrounds, 0, (128, 128), rng, augment=True)
    assert image.shape == (128, 128, 3) and mask.max() == 1


def test_an_image_depends_on_seed_and_number_alone(tmp_path):
    for name, flags in {"two": ["2"], "three": ["3"], "other": ["2", "--seed", "1"]}.items():
        assert draw_cables.main(["--out", str(tmp_path / name), "--size", "256", "--n", *flags]) == 0
    two, three, other = (contents(tmp_path / name) for name in ("two", "three", "other"))
    assert len(two) == 4 and len(three) == 6
    assert {name: three[name] for name in two} == two
    assert not set(two.values()) & set(other.values())
    assert two["imgs/drawn_0_00000.png"] != two["imgs/drawn_0_00001.png"]


def test_the_images_show_thin_and_thick_cables():
    drawn = [draw_cables.draw_image(0, index, 256) for index in range(16)]
    medians = [np.median(widths(mask)) for _, mask in drawn]
    assert min(medians) < 3.5 and max(medians) > 10
    assert max(widths(mask).max() for _, mask in drawn) < 0.5 * 256
    assert all(0.001 < mask.mean() < 0.6 for _, mask in drawn)


def test_half_of_the_cables_are_black_gray_or_white_and_the_others_have_many_colors():
    rng = np.random.default_rng(0)
    colors = np.array([draw_cables.random_look(rng).color for _ in range(400)]).clip(0, 1)
    achromatic = np.ptp(colors, axis=1) < 0.08
    gray = colors[achromatic].mean(axis=1)
    assert 0.4 < achromatic.mean() < 0.7
    assert (gray < 0.2).mean() > 0.2 and (gray > 0.7).mean() > 0.1
    hues = cv2.cvtColor(colors[~achromatic][None].astype(np.float32), cv2.COLOR_RGB2HSV)[0, :, 0]
    assert (np.histogram(hues, bins=6, range=(0, 360))[0] >= 3).all()


@pytest.mark.parametrize("kind", draw_cables.KINDS)
def test_every_kind_of_cable_has_the_width_that_was_asked_for(kind):
    rng = np.random.default_rng(3)
    for _ in range(5):
        strands = [strand for strand in kind(rng, 640, 12.0, 0.0) if strand.is_cable]
        assert strands
        assert all(np.isfinite(strand.points).all() for strand in strands)
        assert 1.0 < 2 * np.min(strands[0].radius) <= 12.0


@pytest.mark.parametrize("kind", [draw_cables.single_cable, draw_cables.bundle])
def test_the_axis_of_a_cable_is_smooth(kind):
    rng = np.random.default_rng(5)
    for _ in range(10):
        points = kind(rng, 640, 8.0, 0.0)[0].points
        steps = np.diff(points, axis=0)
        heading = np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))
        assert np.abs(np.diff(heading)).max() < 0.6


def test_a_second_run_replaces_its_own_files_and_keeps_others(tmp_path, capsys):
    argv = ["--out", str(tmp_path), "--n", "2", "--size", "256"]
    assert draw_cables.main(argv) == 0
    before = contents(tmp_path)
    (tmp_path / "imgs/drawn_0_00001.png").write_bytes(b"half a file")
    assert draw_cables.main(argv) == 0
    assert contents(tmp_path) == before
    (tmp_path / "imgs/mine.jpg").write_bytes(b"a photo")
    assert draw_cables.main(argv) == 2
    message = capsys.readouterr().err
    assert f"--out {tmp_path}" in message and "imgs/mine.jpg" in message and "new folder" in message
    assert draw_cables.main(["--out", str(tmp_path / "imgs/mine.jpg")]) == 2
    assert contents(tmp_path) == before and (tmp_path / "imgs/mine.jpg").read_bytes() == b"a photo"


def test_wrong_flags_are_refused(tmp_path, capsys):
    for flags in (["--n", "0"], ["--size", "100"], ["--seed", "-1"]):
        with pytest.raises(SystemExit):
            draw_cables.main(["--out", str(tmp_path / "drawn"), *flags])
        assert flags[0] in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()
