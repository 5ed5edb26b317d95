"""The commands in the README run, and the files and flags that it names exist."""

import re
import runpy
import shlex
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import write_backgrounds, write_dataset

import export
import finetune
import predict
from tools import bench
from train_config import TrainConfig

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
PARSERS = {"finetune.py": finetune, "predict.py": predict, "export.py": export, "tools/bench.py": bench}


def commands():
    """Every `python SCRIPT …` of the README, with the variables of its block put in, of a loop the first."""
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL):
        block = block.replace("\\\n", " ")
        block = re.sub(r"^for (\w+) in (\S+).*; do$", r'\1="\2"', block, flags=re.MULTILINE)
        flags = dict(re.findall(r'^ *(\w+)="(.*)"$', block, re.MULTILINE))
        for line in block.splitlines():
            for name, value in flags.items():
                line = line.replace(f"${name}", value)
            if match := re.search(r"python3? (\S+\.py .*)$", line.partition("#")[0]):
                yield match[1]


@pytest.mark.parametrize("command", list(commands()))
def test_a_command_of_the_readme_is_taken(command):
    script, *argv = shlex.split(command)
    assert (ROOT / script).is_file()
    if script in PARSERS:
        args = PARSERS[script].parse_args(argv)
        config = getattr(args, "config", None)
        if config and config.parts[0] == "configs":
            assert (ROOT / config).is_file()


def arrange(folder):
    """What the README's commands find: the four steps' folders and YAML, the configs and their data."""
    (yaml,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    for path in ("my_data.yaml", "path/to/config_file"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("\n".join(line.removeprefix("   ") for line in yaml.splitlines()))
    shutil.copytree(ROOT / "configs", folder / "configs")
    names = ("cables_plain", "cables_black", "cables_rendered", "cables_cluttered", "cables_rendered_test")
    datasets = ["my_cables", "my_test_photos", "demo/train", "demo/test", *(f"data/{name}" for name in names)]
    for seed, name in enumerate(datasets):
        write_dataset(folder / name, 3, seed=seed)
    backgrounds = ("my_backgrounds", "demo/backgrounds_train", "demo/backgrounds_test", "data/backgrounds")
    for name in backgrounds:
        write_backgrounds(folder / name)
    shutil.copytree(folder / "my_test_photos/imgs", folder / "photos")


def test_the_commands_of_the_readme_run(tiny_weights, tmp_path, monkeypatch):
    """In their order and with the tiny SAM, but for those that test_export.py or CI run."""
    arrange(tmp_path)
    monkeypatch.chdir(tmp_path)
    tiny = ["--model_type", "tiny", "--checkpoint", str(tiny_weights), "--epoch_num", "1"]
    elsewhere = []
    for command in commands():
        script, *argv = shlex.split(command)
        if script == "finetune.py":
            args = finetune.parse_args(argv)
            results = tmp_path / "exp" / args.exp_name
            if (results / "checkpoints").exists():  # of two ways to train the first leaves its place
                shutil.rmtree(results)
            assert finetune.main([*argv, *tiny, "--device", "cpu", "--num_workers", "0"]) == 0, command
            assert (results / ("preview/test.jpg" if args.preview else "checkpoints/best.pth")).exists()
        elif script == "predict.py":
            assert predict.main([*argv, "--device", "cpu"]) == 0, command
        elif script == "tools/plot_curves.py":
            monkeypatch.setattr(sys, "argv", [script, *argv])
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            elsewhere.append(script)
    assert set(elsewhere) == {"export.py", "tools/bench.py", "tools/results.py"}
    assert len(list(tmp_path.glob("found/masks/*.png"))) == 3
    assert (tmp_path / "demo/precision_and_reuse.png").exists()


def test_the_readme_has_commands_of_every_tool():
    assert {command.split()[0] for command in commands()} > PARSERS.keys()


def test_files_that_the_readme_links_to_exist():
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", prose) if "://" not in link]
    assert len(links) > 15
    assert not [link for link in links if not (ROOT / link).exists()]


def test_flags_that_the_readme_names_exist():
    known = {f"--{field.name}" for field in fields(TrainConfig)}
    for module in PARSERS.values():
        known |= set(re.findall(r'"(--\w+)"', (ROOT / module.__file__).read_text()))
    named = set(re.findall(r"`(--\w+)", TEXT))
    assert named - known <= {"--help"}
