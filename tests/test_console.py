"""Texts of a run: summaries that warn, commands that can be pasted."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

import predict
from console import result_summary, tool_command


def test_predictions_that_stay_empty_are_said_with_the_way_out(tmp_path):
    for iou, is_said in ((0.0, True), (0.00004, True), (0.001, False)):
        metrics = {"iou": iou, "dice": iou, "iteration": 9}
        text = result_summary(metrics, metrics, tmp_path, tmp_path)
        assert ("warning: the predictions are empty" in text) is is_said
        assert is_said == all(flag in text for flag in ("--epoch_num", "--train encoder", "--preview"))


@pytest.mark.parametrize(
    ("scores", "warned"),
    [
        ({"iou": 0.08, "dice": 0.15, "precision": 0.08, "recall": 1.0}, True),
        ({"iou": 0.5, "dice": 0.7, "precision": 0.5, "recall": 0.98}, False),
    ],
)
def test_masks_of_the_whole_image_are_warned_of(tmp_path, scores, warned):
    best = scores | {"iteration": 4}
    text = result_summary({"iou": 0.0, "dice": 0.0}, best, tmp_path, Path("photos"))
    assert ("cover nearly the whole image" in text) == warned


def test_the_summary_ends_with_a_command_that_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "it's data" / "imgs"
    (tmp_path / "exp/my run/checkpoints").mkdir(parents=True)
    folder = Path("exp/my run")
    assert "next" not in result_summary(None, None, folder, images)
    for name in ("last.pth", "best.pth"):
        (folder / "checkpoints" / name).touch()
        last_line = result_summary(None, None, folder, images).splitlines()[-1]
        python, script, *argv = shlex.split(last_line.removeprefix("next "))
        assert shutil.which(python) == sys.executable and Path(script).samefile(predict.__file__)
        args = predict.parse_args(argv)
        assert (args.checkpoint, args.input) == (folder / "checkpoints" / name, Path("it's data/imgs"))
        assert args.output == Path("predictions/my run")


@pytest.mark.parametrize(("prompt", "is_needed"), [("none", 0), ("mixed", 0), ("point", 1), ("box", 1)])
def test_the_next_command_has_a_prompt_file_if_the_training_had_prompts(tmp_path, prompt, is_needed):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.pth").touch()
    text = result_summary(None, None, tmp_path, Path("photos"), prompt)
    assert [text.count(words) for words in ("--prompt FILE", "FILE: points or boxes")] == 2 * [is_needed]


def test_commands_name_paths_as_seen_from_the_current_directory(monkeypatch):
    monkeypatch.chdir(Path(predict.__file__).parent)
    monkeypatch.setattr(sys, "executable", str(Path(".venv/bin/python").absolute()))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/python")
    assert tool_command("export.py", "a b") == ".venv/bin/python export.py 'a b'"
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable)
    assert tool_command("export.py", Path("a")) == "python export.py a"
