"""The commands in the README are ones that the tools take, and the files that it names exist."""

import re
import shlex
from pathlib import Path

import pytest

import bench
import export
import finetune
import predict

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
PARSERS = {"finetune.py": finetune, "predict.py": predict, "export.py": export, "bench.py": bench}


def commands():
    """Every `python SCRIPT …` of the README, with the variables of its block put in."""
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL):
        block = block.replace("\\\n", " ")
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


def test_the_readme_has_commands_of_every_tool():
    assert {command.split()[0] for command in commands()} > PARSERS.keys()


def test_files_that_the_readme_links_to_exist():
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", prose) if "://" not in link]
    assert len(links) > 15
    assert not [link for link in links if not (ROOT / link).exists()]


def test_flags_that_the_readme_names_exist():
    known = set()
    for module in PARSERS.values():
        known |= set(re.findall(r'"(--\w+)"', (ROOT / module.__file__).read_text()))
    named = set(re.findall(r"`(--\w+)", TEXT))
    assert named - known <= {"--help"}
