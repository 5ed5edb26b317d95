"""The layout holds: imports go in one direction, and modules and functions stay short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("base", "sam", "imaging", "tools", "tests")
COMMANDS = {"finetune", "predict", "export", "import_labels"}
FILES = sorted([*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).glob("*.py"))])

MAX_MODULE_LINES = 600
MAX_FUNCTION_LINES = 45


def module_name(path: Path) -> str:
    """The dotted name of a module, such as `sam.encoder`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imported_names(tree: ast.AST) -> set[str]:
    """The dotted names of all imports of a module, those inside functions included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


# The modules of this project that each module imports; `from sam import decoder` is `sam.decoder`.
IMPORTS = {name: imported_names(tree) & MODULES.keys() for name, tree in MODULES.items()}
ROOT_MODULES = {name for name in MODULES if "." not in name}


def modules_of(package: str) -> set[str]:
    return {name for name in MODULES if name.startswith(f"{package}.")}


def forbidden_imports(importers: set[str], allowed: set[str]) -> list[str]:
    return sorted(f"{name} imports {other}" for name in importers for other in IMPORTS[name] - allowed)


def test_the_walk_sees_imports():
    assert {"base.errors", "sam.variants"} <= IMPORTS["sam.encoder"] | IMPORTS["sam.variants"]
    assert {"config", "dataset"} <= IMPORTS["experiment"]
    assert imported_names(ast.parse("def f():\n    from sam import decoder")) == {"sam", "sam.decoder"}


def test_packages_import_in_one_direction():
    base, sam, imaging = modules_of("base"), modules_of("sam"), modules_of("imaging")
    assert forbidden_imports(base, base) == []
    assert forbidden_imports(sam, base | sam) == []
    assert forbidden_imports(imaging, base | imaging | {"sam.point_labels"}) == []


def test_root_modules_import_neither_commands_nor_tools_nor_tests():
    allowed = ROOT_MODULES - COMMANDS | modules_of("base") | modules_of("sam") | modules_of("imaging")
    assert forbidden_imports(ROOT_MODULES, allowed) == []


def test_only_tests_import_commands():
    importers = MODULES.keys() - modules_of("tests")
    assert forbidden_imports(importers, MODULES.keys() - COMMANDS) == []


def test_no_test_file_imports_another():
    imports = {name: imported_names(MODULES[name]) for name in modules_of("tests")}
    found = {name: [n for n in names if n.startswith("test_")] for name, names in imports.items()}
    assert [name for name, names in found.items() if names] == []


@pytest.mark.parametrize("start", sorted(MODULES))
def test_no_module_imports_itself_through_others(start):
    reached, pending = set(), set(IMPORTS[start])
    while pending:
        name = pending.pop()
        reached.add(name)
        pending |= IMPORTS[name] - reached
    assert start not in reached


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_module_has_too_many_lines(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_MODULE_LINES


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_function_has_too_many_lines(name):
    functions = [n for n in ast.walk(MODULES[name]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [(f"{name}.{node.name}", node.end_lineno - node.lineno + 1) for node in functions]
    assert [(function, lines) for function, lines in lengths if lines > MAX_FUNCTION_LINES] == []
