"""What is known of a checkpoint: written, read, damaged, missing."""

import json
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import run_tiny, tiny_config

import evaluation
import finetune
from evaluation import training_cable_width
from imaging.masks import read_mask
from sidecar import Sidecar, median_cable_width, read_sidecar, sidecar_path, write_sidecar

SIDECAR = Sidecar(model_type="tiny", input_size=64, threshold=-0.75, cable_width=4.5, metrics={"iou": 0.8})


def test_what_is_written_is_read(tmp_path):
    write_sidecar(SIDECAR, tmp_path / "best.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["best.json"]
    assert read_sidecar(tmp_path / "best.pth", "tiny") == SIDECAR


def test_keys_of_other_versions_are_ignored_and_missing_keys_have_defaults(tmp_path):
    (tmp_path / "best.json").write_text('{"model_type": "tiny", "input_size": 64, "new_key": [1]}')
    sidecar = read_sidecar(tmp_path / "best.pth", "tiny")
    assert (sidecar.threshold, sidecar.cable_width, sidecar.metrics) == (0, None, {})


def test_nothing_is_said_of_a_missing_one(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_sidecar(tmp_path / "best.pth", "tiny") is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is damaged"),
        (SIDECAR.model_dump_json().encode()[:-9], "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[1, 2]", "is damaged"),
        (SIDECAR.model_dump_json().replace("-0.75", '"low"').encode(), "is damaged (threshold: "),
        (SIDECAR.model_dump_json().replace("4.5", "-4.5").encode(), "is damaged (cable_width: "),
        (SIDECAR.model_dump_json().replace("-0.75", "NaN").encode(), "is damaged (threshold: "),
        (SIDECAR.model_dump_json().replace("tiny", "vit_b").encode(), "describes vit_b, but the weights are"),
        (None, "cannot be read"),
    ],
)
def test_one_that_cannot_be_used_is_ignored_with_a_warning(tmp_path, content, reason):
    path = sidecar_path(tmp_path / "best.pth")
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.warns(UserWarning, match="best.json is ignored") as warned:
        assert read_sidecar(tmp_path / "best.pth", "tiny") is None
    assert reason in str(warned[0].message)


def test_the_width_is_the_median_over_all_centerlines():
    masks = np.zeros((3, 60, 200), bool)
    masks[0, 20:29, :] = True  # 9 px wide
    masks[1, 20:23, 50:100] = True  # 3 px wide, and short
    assert median_cable_width(masks) == pytest.approx(9, abs=0.1)
    assert median_cable_width(masks[1:]) == pytest.approx(3, abs=0.1)
    assert median_cable_width(masks[2:]) is None
    assert median_cable_width([]) is None


# --- Runs -------------------------------------------------------------------------------------


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    """Runs write to exp/ of the current directory."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("train", ["decoder", "encoder"])  # their loss grids differ
def test_the_width_in_training_is_in_pixels_of_the_input(tiny_weights, config_file, in_tmp_path, train):
    """Photos of 64 px as they are, and an input of 64 px."""
    config = config_file(bg_paths=[], w_aug=False)
    experiment = finetune.prepare(tiny_config(config, tiny_weights, "--train", train))
    masks = [read_mask(pair.mask_path) for pair in experiment.train_set.datasets[0].pairs]
    assert training_cable_width(experiment.train_set) == pytest.approx(median_cable_width(masks), abs=1)
    assert not Path("exp").exists()


def test_each_checkpoint_of_a_run_has_one(tiny_weights, config_file, in_tmp_path):
    flags = ("--epoch_num", 4, "--save_interval", 2, "--batch_size", 2, "--test_interval", 5)
    assert run_tiny(config_file(), tiny_weights, *flags) == 0
    paths = sorted(Path("exp/run/checkpoints").glob("*.pth"))
    sidecars = {path.stem: read_sidecar(path, "tiny") for path in paths}
    lines = [json.loads(line) for line in Path("exp/run/metrics.jsonl").read_text().splitlines()]
    ious = {line["iteration"]: line["iou"] for line in lines}
    iterations = {name: sidecar.iteration for name, sidecar in sidecars.items()}
    assert iterations == {"best": iterations["best"], "epoch_0002": 6, "epoch_0004": 12, "last": 12}
    tests = {name: sidecar.metrics["iteration"] for name, sidecar in sidecars.items()}
    assert tests == {"best": iterations["best"], "epoch_0002": 5, "epoch_0004": 12, "last": 12}
    for name, sidecar in sidecars.items():
        assert sidecar.metrics["iou"] == pytest.approx(ious[tests[name]])
        assert sidecar.threshold == 0 and 3 < sidecar.cable_width < 9
        assert (sidecar.train, sidecar.input_size, sidecar.flags["batch_size"]) == ("decoder", 64, 2)
        assert (sidecar.data["train"][0]["pairs"], sidecar.data["test"]["pairs"]) == (6, 3)


def test_the_width_is_measured_once_in_a_run(tiny_weights, config_file, in_tmp_path, monkeypatch):
    last = Path("exp/run/checkpoints/last.pth")
    assert run_tiny(config_file(), tiny_weights, "--epoch_num", 1) == 0
    width = read_sidecar(last, "tiny").cable_width
    monkeypatch.setattr(finetune, "training_cable_width", lambda train_set: 99.0)
    assert run_tiny(config_file(), tiny_weights, "--epoch_num", 2, "--resume") == 0
    sidecar = read_sidecar(last, "tiny")
    assert sidecar.iteration == 4 and 3 < width < 9 and sidecar.cable_width == width


def test_a_resumed_run_remembers_its_last_test(tiny_weights, config_file, in_tmp_path, at_iteration):
    def stop(batch, net):
        signal.raise_signal(signal.SIGTERM)

    flags = ("--epoch_num", 1, "--save_interval", 1, "--batch_size", 1, "--test_interval", 4)
    at_iteration(5, stop)
    assert run_tiny(config_file(), tiny_weights, *flags) == 128 + signal.SIGTERM
    flags = ("--epoch_num", 2, *flags[2:-1], 100)
    assert run_tiny(config_file(), tiny_weights, *flags, "--resume") == 0
    sidecar = read_sidecar(Path("exp/run/checkpoints/epoch_0001.pth"), "tiny")
    assert (sidecar.iteration, sidecar.metrics["iteration"]) == (6, 4)


def test_the_threshold_is_that_of_the_last_test(tiny_weights, config_file, in_tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "robust_threshold", lambda stats: -0.5)
    assert run_tiny(config_file(), tiny_weights, "--epoch_num", 1) == 0
    assert read_sidecar(Path("exp/run/checkpoints/last.pth"), "tiny").threshold == -0.5


def test_without_a_test_set_the_threshold_is_0(tiny_weights, config_file, in_tmp_path):
    assert run_tiny(config_file(with_test=False), tiny_weights, "--epoch_num", 1) == 0
    sidecar = read_sidecar(Path("exp/run/checkpoints/last.pth"), "tiny")
    assert (sidecar.threshold, sidecar.metrics, sidecar.data["test"]) == (0, {}, None)
