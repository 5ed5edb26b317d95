"""The commands in README.md and docs/ run, and the files, flags, tests and links in them exist."""

import re
import shlex
import shutil
import textwrap
from pathlib import Path

import fake_cuda_check
import pytest
import segment_anything
import torch
from conftest import TINY, write_backgrounds, write_dataset, write_video
from label_samples import WRITERS

import export
import finetune
import import_labels
import predict
import runtime
from imaging.files import read_image
from tools import (
    bench,
    draw_cables,
    measure_colors,
    measure_crossings,
    measure_edges,
    measure_threshold,
    plot_curves,
    results,
    soak,
)
from train_config import MAY_CHANGE_ON_RESUME

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {
    "finetune.py": finetune,
    "predict.py": predict,
    "export.py": export,
    "import_labels.py": import_labels,
    "tools/plot_curves.py": plot_curves,
    "tools/bench.py": bench,
    "tools/draw_cables.py": draw_cables,
    "tools/measure_colors.py": measure_colors,
    "tools/measure_crossings.py": measure_crossings,
    "tools/measure_edges.py": measure_edges,
    "tools/measure_threshold.py": measure_threshold,
    "tools/results.py": results,
    "tools/soak.py": soak,
    "tests/fake_cuda_check.py": fake_cuda_check,
}
RUN_HERE = ("finetune.py", "predict.py", "export.py", "import_labels.py", "tools/plot_curves.py")

# The other commands. Each has the file that runs it, perhaps in a shorter form, and the text there that does.
RUN_ELSEWHERE = {
    "make demo": (".ci/run", "make demo"),
    "python3 -m venv .venv": ("Makefile", "$(PYTHON) -m venv .venv"),
    ".venv/bin/pip install -r requirements.txt": ("requirements-dev.txt", "-r requirements.txt"),
    ".venv/bin/python finetune.py --config configs/demo.yaml --model_type lite_medsam --train decoder "
    "--batch_size 2 --epoch_num 14 --test_interval 56 --exp_name demo": (
        "Makefile",
        "finetune.py --config configs/demo.yaml --model_type lite_medsam --train decoder --batch_size 2",
    ),
    "torchrun --nproc_per_node=2 finetune.py --config my_data.yaml --exp_name my_cables_2 "
    "--model_type vit_b": ("tests/test_distributed.py", '"-m", "torch.distributed.run"'),
    "tensorboard --logdir exp": (".ci/run", "tensorboard --logdir exp"),
    "python tools/bench.py --model_type lite_medsam --seconds 15": (
        ".ci/run",
        "tools/bench.py --model_type lite_medsam --batch_size 2",
    ),
    "python tools/bench.py --model_type vit_b --train lora --parts step --batch_size 4 --seconds 0 "
    "--without_baseline": (
        ".ci/run",
        "tools/bench.py --model_type lite_medsam --batch_size 1 --seconds 0 --train lora --parts step",
    ),
    "python tests/fake_cuda_check.py --sm 75": (".ci/run", "tests/fake_cuda_check.py --sm 75"),
    "python tests/fake_cuda_check.py --gib 160 --case 'finetune.py --model_type vit_b --checkpoint vit_b.pth "
    "--train lora --batch_size 4'": ("tests/test_cuda_stand_in.py", "run_cases(library"),
    "python tools/measure_crossings.py": ("tests/test_measure_crossings.py", "tool.main("),
    "python tools/measure_colors.py --checkpoint exp/all/checkpoints/last.pth --data data/cables_plain "
    "--every 4": ("tests/test_measure_colors.py", "measure_colors.main("),
    "python tools/measure_edges.py --data data/cables_cluttered --predictions "
    "predictions/cables_cluttered/masks --move 1": ("tests/test_measure_edges.py", "tool.main(argv)"),
    "python tools/measure_edges.py --data my_cables": ("tests/test_measure_edges.py", 'tool.main(["--data"'),
    "python tools/measure_threshold.py --checkpoint exp/all/checkpoints/last.pth "
    "--data data/cables_cluttered": (
        "tests/test_measure_threshold.py",
        "tool.main(",
    ),
    "python tools/draw_cables.py --out data/drawn --n 500": (
        "tests/test_draw_cables.py",
        'draw_cables.main(["--out"',
    ),
    "python tools/results.py --data data": (".ci/run", "tools/results.py --data data"),
    "python tools/soak.py --iterations 3000": (".ci/run", "tools/soak.py --iterations 60"),
}


# --- Reading the documents --------------------------------------------------------------------


def split_document(path: Path) -> tuple[str, list[tuple[str, str]]]:
    """The text of a document outside code blocks, and its code blocks as (language, dedented text)."""
    prose, blocks, block = [], [], None
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip().startswith("```"):
            (prose if block is None else block).append(line)
        elif block is None:
            language, block = line.strip().removeprefix("```"), []
        else:
            blocks.append((language, textwrap.dedent("\n".join(block))))
            block = None
    assert block is None, f"{path}: a code block does not end"
    return "\n".join(prose), blocks


def read_commands(path: Path) -> list[list[str]]:
    """The commands of the bash blocks of a document, one per line, as lists of words."""
    texts = [text for language, text in split_document(path)[1] if language == "bash"]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [command for path in DOCS for command in read_commands(path)]
PROSE = {path: split_document(path)[0] for path in DOCS}


def runs_here(command: list[str]) -> bool:
    return command[0] == "python" and command[1] in RUN_HERE


def help_text(script: str, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit):
        SCRIPTS[script].parse_args(["--help"])
    return capsys.readouterr().out


# --- Commands ---------------------------------------------------------------------------------


def arrange_data(folder: Path) -> None:
    """Make the datasets, configs and folders that the commands name."""
    (text,) = [text for language, text in split_document(ROOT / "README.md")[1] if language == "yaml"]
    (folder / "my_data.yaml").write_text(text)
    shutil.copytree(ROOT / "configs", folder / "configs")
    datasets = ["my_cables", "my_test_photos", "data/cables_plain", "data/cables_black"]
    datasets += ["data/cables_rendered", "data/cables_cluttered", "data/cables_rendered_test", "data/drawn"]
    for seed, name in enumerate(datasets):
        write_dataset(folder / name, 3, seed=seed)
    for name in ("my_backgrounds", "data/backgrounds", "data/backgrounds_everyday"):
        write_backgrounds(folder / name)
    shutil.copytree(folder / "my_test_photos/imgs", folder / "photos")
    write_video(folder / "clip.mp4", [read_image(path) for path in sorted((folder / "photos").iterdir())])
    for name, (write, _) in WRITERS.items():
        write(folder / "exports" / name)


def run(script: str, argv: list[str], tiny_weights: Path) -> int:
    """Run a command in this process on a CPU, and train the tiny SAM instead of a large one."""
    if "--help" in argv:
        with pytest.raises(SystemExit) as exit_code:
            SCRIPTS[script].main(argv)
        return exit_code.value.code
    extra = []
    if script == "finetune.py":
        epochs = 2 if "--resume" in argv else 1  # a resumed run has an epoch left
        extra = ["--model_type", "tiny", "--checkpoint", tiny_weights, "--epoch_num", epochs]
        extra += ["--device", "cpu", "--num_workers", 0]
    elif script == "predict.py":
        extra = ["--device", "cpu"]
    return SCRIPTS[script].main([*argv, *map(str, extra)])


def test_the_commands_run_in_the_order_of_the_documents(tiny_weights, tmp_path, monkeypatch):
    arrange_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in filter(runs_here, COMMANDS):
        _, script, *argv = command
        for name in ("predictions", "predictions_test"):  # two documents show the same command
            shutil.rmtree(name, ignore_errors=True)
        assert run(script, argv, tiny_weights) == 0, shlex.join(command)
        if script == "predict.py":
            output = Path(argv[argv.index("--output") + 1])
            assert len(list(output.glob("masks/*.png"))) == 3, shlex.join(command)
    assert Path("exp/my_cables/preview/test.jpg").exists()
    tests = Path("exp/my_cables/metrics.jsonl").read_text().splitlines()
    assert len(tests) == 7  # the baseline, and each of the 3 iterations of the run and of the resumed run
    assert Path("exp/my_cables_vit_b/checkpoints/best.pth").exists()
    assert Path("exported/config.json").exists() and Path("cables.onnx").exists()
    assert Path("curves.png").exists()
    imported = [Path(argv[argv.index("--output") + 1]) for _, script, *argv in COMMANDS if "import" in script]
    assert len(imported) >= 7 and all(len(list(path.glob("masks/*.png"))) == 2 for path in imported)


def test_every_other_command_is_listed_with_who_runs_it():
    others = {shlex.join(command) for command in COMMANDS if not runs_here(command)}
    assert others == RUN_ELSEWHERE.keys()


@pytest.mark.parametrize(("file", "text"), RUN_ELSEWHERE.values(), ids=RUN_ELSEWHERE)
def test_the_other_commands_run_where_the_list_says(file, text):
    assert text in " ".join((ROOT / file).read_text().replace("\\\n", " ").split())


def test_the_script_that_runs_the_other_commands_uses_the_makefile():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert {"make test", "make lint"} <= set(lines)
    assert "pip install -r requirements-dev.txt" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("text", [text for text in RUN_ELSEWHERE if ".py" in text])
def test_the_flags_of_a_command_that_runs_elsewhere_are_accepted(text, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(text)
    start = next(index for index, word in enumerate(words) if word in SCRIPTS)
    SCRIPTS[words[start]].parse_args(words[start + 1 :])


def test_every_command_for_users_and_maintainers_is_shown():
    shown = {word for command in COMMANDS for word in command if word.endswith(".py")}
    assert shown == SCRIPTS.keys()


def test_the_python_example_runs_and_both_ways_give_one_mask(tiny_weights, data, tmp_path, monkeypatch):
    def build(checkpoint):
        sam = TINY.build()
        sam.load_state_dict(torch.load(checkpoint, weights_only=True))
        return sam

    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", build)
    monkeypatch.setattr(runtime, "amp_dtype", lambda choice, device: None)  # float32, as in that package
    monkeypatch.chdir(tmp_path)
    for name in ("my_cables", "my_cables_vit_b"):
        Path(f"exp/{name}/checkpoints").mkdir(parents=True)
        shutil.copy(tiny_weights, f"exp/{name}/checkpoints/best.pth")
    (example,) = [text for language, text in split_document(ROOT / "README.md")[1] if language == "python"]
    names = {"image": read_image(data / "test/imgs/1.png")}
    exec(example, names)
    assert names["mask"].shape == names["image"].shape[:2]
    assert names["masks"].shape == (1, *names["image"].shape[:2])
    assert (names["mask"] == names["masks"][0]).all() and names["masks"].any()


# --- Flags, files, tests, links ---------------------------------------------------------------


def test_flags_that_the_documents_name_exist(capsys):
    known = set(re.findall(r"--\w+", "".join(help_text(script, capsys) for script in SCRIPTS)))
    named = {flag for text in PROSE.values() for flag in re.findall(r"`(--\w+)", text)}
    assert len(named) > 40
    assert named - known == set()


@pytest.mark.parametrize(
    ("script", "document"),
    [
        ("finetune.py", "configuration.md"),
        ("predict.py", "prediction.md"),
        ("export.py", "export.md"),
        ("import_labels.py", "labels.md"),
    ],
)
def test_every_flag_is_in_its_document(script, document, capsys):
    options = r"^  (?:-\w[^,]*, )?(--\w+)"  # "  -c CONFIG, --config CONFIG  help"
    flags = set(re.findall(options, help_text(script, capsys), re.MULTILINE)) - {"--help"}
    text = (ROOT / "docs" / document).read_text()
    assert len(flags) > 2
    assert [flag for flag in sorted(flags) if not re.search(rf"{flag}\b", text)] == []


def test_the_flags_that_may_change_on_resume_are_listed():
    text = PROSE[ROOT / "docs/configuration.md"]
    (paragraph,) = [p for p in text.split("\n\n") if p.startswith("These flags may change on resume:")]
    assert re.findall(r"`--(\w+)`", paragraph) == list(MAY_CHANGE_ON_RESUME)


def heading_anchors(path: Path) -> set[str]:
    """The names that GitHub gives to the headings of a document."""
    headings = [line.lstrip("# ") for line in PROSE[path].splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PROSE[path]) if "://" not in link]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in heading_anchors(target), link


def test_tests_that_the_documents_name_exist():
    named = {name for text in PROSE.values() for name in re.findall(r"`(tests/\w+\.py::\w+)`", text)}
    missing = []
    for name in sorted(named):
        file, _, function = name.partition("::")
        if not (ROOT / file).exists() or f"def {function}(" not in (ROOT / file).read_text():
            missing.append(name)
    assert len(named) > 20
    assert missing == []


def test_the_file_tree_of_the_readme_names_every_module_once():
    (tree,) = [text for language, text in split_document(ROOT / "README.md")[1] if language == "text"]
    named = [line.split()[0] for line in tree.splitlines() if line.split()[0].endswith(".py")]
    modules = [
        *ROOT.glob("*.py"),
        *(path for name in ("base", "sam", "imaging") for path in ROOT.glob(f"{name}/*.py")),
    ]
    assert sorted(named) == sorted(
        path.relative_to(ROOT).as_posix() for path in modules if path.name != "__init__.py"
    )


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
