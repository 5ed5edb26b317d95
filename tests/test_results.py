"""The rerun of docs/results.md: which commands it runs, what it prints and draws."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import write_backgrounds, write_dataset

from tools import results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, (name, count) in enumerate((("cables_plain", 4), *results.TEST_SETS.items())):
        write_dataset(tmp_path / "data" / name, min(count, 4), seed=seed)
    write_backgrounds(tmp_path / "data/backgrounds")
    return tmp_path


def predict_truth(script, *flags):
    """In place of a command: predict.py finds exactly the ground truth, finetune.py writes no weights."""
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    if script == "finetune.py":
        return
    output = Path(values["--output"])
    (output / "masks").mkdir(parents=True)
    rows = [("picture", "iou", "cldice")]
    for number, path in enumerate(sorted(Path(values["--masks"]).iterdir())):
        cv2.imwrite(str(output / "masks" / f"{path.stem}.png"), cv2.imread(str(path)))
        rows.append((path.stem, 0.5 + number / 10, 0.25))
    with (output / "measures.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_its_table_and_figures_follow_from_the_commands(folder, monkeypatch, capsys):
    commands = []

    def record(script, *flags):
        commands.append([script, *map(str, flags)])
        predict_truth(script, *flags)

    monkeypatch.setattr(results, "run_command", record)
    argv = ["--data", "data", "--out", "bars", "--rows", "baseline", "composites, a box", "--seeds", "1"]
    assert results.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "| baseline | " + " | ".join(["0.650 (0.250)"] * 3) + " |",
        "| composites, a box | " + " | ".join(["0.650 (0.250)"] * 3) + " |",
    ]
    assert Path("bars.png").exists() and Path("bars_maps.png").exists()
    (training,) = [command for command in commands if command[0] == "finetune.py"]
    assert training[training.index("--prompt") + 1] == "box"
    (dataset,) = yaml.safe_load(Path(training[2]).read_text())["dataset"]["train"]
    assert dataset["w_aug"] and dataset["bg_paths"] == [str(folder / "data/backgrounds")]
    predictions = [command for command in commands if command[0] == "predict.py"]
    assert all(command[command.index("--tiles") + 1] == "off" for command in predictions)
    assert len(predictions) == 6 and sum("--prompt" in command for command in predictions) == 3
    box = Path(predictions[-1][-1]).read_text().splitlines()
    assert box[0] == "image,x1,y1,x2,y2" and len(box) == 5
    commands.clear()
    assert results.main([*argv[:2], "--out", "again", *argv[4:]]) == 0  # what is measured is used again
    assert [command[0] for command in commands] == ["finetune.py"]


def test_a_map_colors_what_is_found_missed_and_wrong(tmp_path):
    for name, rows in (("truth", [255, 255, 0, 0]), ("prediction", [255, 0, 255, 0])):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.array(rows, np.uint8)[:, None])
    colors = results.error_map(tmp_path / "truth.png", tmp_path / "prediction.png")[:, 0]
    assert list(map(tuple, colors)) == [results.FOUND, results.MISSED, results.WRONG, (255, 255, 255)]


def test_a_folder_that_is_missing_is_named(folder, capsys):
    assert results.main(["--data", "nowhere", "--out", "bars"]) == 2
    assert "--data: nowhere/cables_plain: no such folder" in capsys.readouterr().err
