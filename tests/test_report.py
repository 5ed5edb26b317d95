"""The report of a run: what it shows, and that it never costs the run."""

import json
import os
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_tiny, write_dataset

import export
import finetune
import predict
import report
from base.errors import UserError
from train_state import Schedule

REPORT = Path("exp/run/report.html")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Page(HTMLParser):
    """A parsed page: its elements with their attributes, its text, and the text of each kind of element."""

    def __init__(self, path=REPORT):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", text))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag):
        return [text for name, text in self.texts if name == tag]


@pytest.fixture
def named_like_html(data):
    """12 test images, one of which has a name full of special characters."""
    shutil.rmtree(data / "test")
    write_dataset(data / "test", 12, seed=1)
    for kind in ("imgs", "masks"):
        (data / "test" / kind / "0.png").rename(data / "test" / kind / '<b>&"0.png')
    return data


def test_a_run_ends_with_a_report_of_one_file(tiny_weights, config_file, named_like_html, capsys):
    flags = ("-e", 3, "--lr", 0.01, "--log_interval", 2, "--test_interval", 3, "-b", 2, "--seed", 4)
    assert run_tiny(config_file(), tiny_weights, *flags) == 0
    output = capsys.readouterr().out
    page = Page()
    assert page.open == [] and REPORT.stat().st_size < 3e6
    content = REPORT.read_text()
    sources = [str(attributes.get("src", "")) for _, attributes in page.elements]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources if source)
    assert not re.search(r"href|http|url\(|<script|<link|@import", content)

    # the result
    tests = [json.loads(line)["iou"] for line in Path("exp/run/metrics.jsonl").read_text().splitlines()]
    assert f"Test IoU {tests[0]:.3f} → {max(tests[1:]):.3f} on 12 images, with exp/run/ch" in content
    assert "The run finished after 9 iterations" in content
    assert "report           exp/run/report.html" in output

    # three curves: the loss, IoU and clDice of four tests, and the thresholds
    assert len(page.all("svg")) == 3
    lengths = [len(line["points"].split()) for line in page.all("polyline")]
    assert lengths == [5, 4, 4, 65]

    # 4 worst, 2 median and 2 best images, each beside what was found in it; and 6 training samples
    captions = [text for text in page.text("figcaption") if "IoU" in text and "png" in text]
    roles = [caption.partition(",")[0] for caption in captions]
    assert roles == ["worst"] * 4 + ["median"] * 2 + ["best"] * 2
    shown = [float(re.search(r"IoU (\d\.\d+)", caption)[1]) for caption in captions]
    assert shown == sorted(shown)
    assert len(page.all("img")) == 2 * 8 + 6

    # the data, and the flags that differ from the defaults first
    assert any("test " in text and "12" in text for text in page.text("pre"))
    names = page.text("th")
    changed = names[: names.index("--max_pixels")]
    assert set(changed) >= {"--config", "--exp_name", "--model_type", "--epoch_num", "--lr", "--seed"}
    assert not {"--train", "--warmup_steps", "--alpha", "--gamma"} & set(changed)


def test_names_of_files_are_escaped(tiny_weights, config_file, named_like_html):
    for path in sorted((named_like_html / "test/imgs").glob("[1-9]*")):
        path.unlink()
        (named_like_html / "test/masks" / path.name).unlink()
    assert run_tiny(config_file(), tiny_weights, "-e", 1) == 0
    assert "&lt;b&gt;&amp;&quot;0.png" in REPORT.read_text()
    page = Page()
    assert any('<b>&"0.png' in text for text in page.text("figcaption")) and not page.all("b")
    assert len(page.all("img")) == 2 * 1 + 6


def test_a_name_that_is_no_unicode_is_shown(tiny_weights, config_file, data):
    for kind in ("imgs", "masks"):
        (data / "test" / kind / "0.png").rename(data / "test" / kind / os.fsdecode(b"caf\xe9.png"))
    assert run_tiny(config_file(), tiny_weights, "-e", 1) == 0
    assert any("caf?.png" in text for text in Page().text("figcaption"))


def test_its_commands_can_be_pasted(tiny_weights, config_file, monkeypatch):
    assert run_tiny(config_file(), tiny_weights, "-e", 2) == 0
    lines = Page().text("pre")[1:]  # after the data
    commands = {Path(words[1]).name: words[2:] for words in map(shlex.split, lines)}
    assert commands.keys() == {"predict.py", "export.py", "finetune.py"}
    best = Path("exp/run/checkpoints/best.pth")
    assert predict.parse_args(commands["predict.py"]).checkpoint == best
    assert predict.main([*commands["predict.py"], "--device", "cpu"]) == 0
    assert Path("predictions/run/worst.jpg").exists()
    assert export.parse_args(commands["export.py"]).checkpoint == best
    resumed = finetune.parse_args(commands["finetune.py"])
    assert resumed.resume and (resumed.exp_name, resumed.epoch_num) == ("run", 4)


def test_after_a_training_with_boxes_its_commands_need_a_file_of_them(tiny_weights, config_file, capsys):
    assert run_tiny(config_file(), tiny_weights, "-e", 1, "--prompt", "box") == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next ")]
    commands = [text for text in Page().text("pre") if "predict.py" in text] + printed
    assert len(commands) == 2 and all(" --prompt FILE" in command for command in commands)


@pytest.mark.parametrize(
    ("with_test", "flags", "expected"),
    [
        (True, (), "Predict the test images:"),
        (False, (), "Predict the training images:"),
        (False, ("--val_percentage", 30), "Predict the training images:"),
    ],
)
def test_the_images_of_the_command_are_named_as_what_they_are(
    tiny_weights, config_file, with_test, flags, expected
):
    assert run_tiny(config_file(with_test=with_test), tiny_weights, "-e", 1, *flags) == 0
    page = Page()
    assert expected in page.text("p")
    (command,) = [text for text in page.text("pre") if "predict.py" in text]
    assert ("/test/imgs" if with_test else "/cables/imgs") in command


def test_a_run_that_ends_early_has_a_report(tiny_weights, config_file, at_iteration):
    def fail(batch, net):
        raise UserError("the disk is gone")

    at_iteration(3, fail)
    assert run_tiny(config_file(), tiny_weights, "-e", 2, "-b", 2, "--test_interval", 2) == 1
    content = REPORT.read_text()
    assert "The run ended early after 2 iterations" in content
    assert "--epoch_num" not in Page().text("pre")[-1] and "--resume" in Page().text("pre")[-1]


def test_a_run_without_a_test_has_a_report(tiny_weights, config_file):
    assert run_tiny(config_file(with_test=False), tiny_weights, "-e", 2) == 0
    content = REPORT.read_text()
    assert "the run has no test set" in content and "last.pth" in content
    assert len(Page().all("img")) == 6


def test_a_report_that_cannot_be_written_costs_a_warning(tiny_weights, config_file, monkeypatch):
    def damage(folder, model_type):
        raise ValueError("damaged")

    monkeypatch.setattr(report, "read_records", damage)
    with pytest.warns(UserWarning, match=r"the report exp/run/report\.html was not written: damaged"):
        assert run_tiny(config_file(), tiny_weights, "-e", 1) == 0
    assert not REPORT.exists() and Path("exp/run/checkpoints/last.pth").exists()


def test_the_images_say_whose_predictions_they_are(tiny_weights, config_file, monkeypatch):
    run_test = finetune.run_test
    for best, said in (
        (2, "best.pth is of iteration 2, and its masks differ"),
        (6, "which are those of best"),
    ):

        def best_at(*args, iteration, best=best, **options):
            return run_test(*args, iteration=iteration, **options) | {"iou": 0.5 + 0.1 * (iteration == best)}

        monkeypatch.setattr(finetune, "run_test", best_at)
        flags = ("-e", 2, "-b", 2, "--test_interval", 2, "-n", f"best at {best}")
        assert run_tiny(config_file(), tiny_weights, *flags) == 0
        notes = Page(Path(f"exp/best at {best}/report.html")).text("p")
        (note,) = [note for note in notes if note.startswith("Predicted with the weights of the last test")]
        assert "at iteration 6" in note and said in note


def test_damaged_records_are_left_out_and_named(tiny_weights, config_file):
    assert run_tiny(config_file(), tiny_weights, "-e", 1) == 0
    folder = Path("exp/run")
    whole = report.read_records(folder, "tiny")
    assert whole.tests and whole.last_test and whole.best and whole.losses
    lines = (folder / "metrics.jsonl").read_text()
    added = ['{"iteration": 1}', '["iou"]', '{"iteration": 1, "iou": null, "cldice": 0.5}', "{"]
    (folder / "metrics.jsonl").write_text(lines + "\n".join(added))
    last_test = json.loads((folder / "last_test.json").read_text())
    del last_test["images"][0]["iou"]
    (folder / "last_test.json").write_text(json.dumps(last_test))
    (folder / "checkpoints/best.json").write_text('{"model_type": "tiny", "input_size": 64, "iteration": 1}')
    with pytest.warns(UserWarning, match="the report leaves out") as warned:
        records = report.read_records(folder, "tiny")
    n = len(lines.splitlines())
    names = [str(warning.message).split(": ")[0] for warning in warned]
    bad_lines = [f"the report leaves out line {n + k} of {folder / 'metrics.jsonl'}" for k in (1, 2, 3, 4)]
    assert names == [*bad_lines, f"the report leaves out {folder / 'last_test.json'}"]
    assert records.tests == whole.tests and records.last_test is None
    assert "iou" in str(warned[0].message) and "images.0.iou" in str(warned[4].message)
    experiment = SimpleNamespace(checkpoints=folder / "checkpoints", test_set=[1])
    assert report.result_line(records, experiment) == "No result yet."
    assert f"→ {whole.best.metrics['iou']:.3f} on 1 images" in report.result_line(whole, experiment)


def test_long_curves_are_averaged():
    points = [(float(x), 2.0 * x) for x in range(5000)]
    thinned = report.thinned(points)
    assert len(thinned) == report.MAX_POINTS
    assert thinned[0] == (12.0, 24.0) and thinned[-1] == (4987.0, 9974.0)
    assert report.thinned(points[:3]) == points[:3] and report.thinned([]) == []
    svg = report.chart("<loss>", {"a": [(0.0, float("nan")), (1.0, 2.0)]})
    assert svg.count("<circle") == 1 and "nan" not in svg and "&lt;loss&gt;" in svg


@pytest.mark.parametrize(
    ("flags", "train"),
    [([], "encoder"), (["--model_type=vit_b"], "decoder"), (["--embedding_reuse=2"], "decoder")],
)
def test_defaults_are_those_of_the_machine_and_are_not_announced_again(flags, train, capsys):
    config = finetune.parse_args(["--config=c.yaml", "--device=cpu", *flags])
    capsys.readouterr()
    defaults = report.default_flags(SimpleNamespace(config=config, schedule=Schedule(6, 1, 1, 1)))
    assert (defaults["model_type"], defaults["train"], config.train) == ("lite_medsam_512", train, train)
    assert capsys.readouterr().out == ""
