"""The folder tree is the architecture: imports run downward, and one module reads the environment."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hetegen_rec"
ROOMS = (
    "_stack",
    "verbs",
    "files",
    "locks",
    "checkout",
    "sealing",
    "terminal",
    "config",
    "data",
    "models",
    "distributed",
    "inference",
    "scoring",
    "serving",
    "evaluation",
    "training",
    "export",
    "jobs",
    "launching",
    "cli",
    "scoring_cli",
    "main",
)
"""From the ground up; a module may import from its own room and from those before it."""
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
READER_OF_ENVIRONMENT = PACKAGE / "distributed" / "runtime.py"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[str, int]]:
    """Rooms of this package that a module imports from, also inside functions, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "hetegen_rec":
            names = [f"hetegen_rec.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "hetegen_rec" and rest:
                yield rest.split(".")[0], node.lineno


def test_every_module_stands_in_a_known_room():
    assert {room_of(path) for path in MODULES} == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downward(path):
    above = ROOMS[ROOMS.index(room_of(path)) + 1 :]
    assert [found for found in imported_rooms(path) if found[0] in above] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_name_the_whole_path(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]


def test_one_module_reads_the_environment():
    readers = set()
    for path in [*MODULES, *ROOT.glob("launch/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            if {"environ", "environb", "getenv", "putenv"} & set(names):
                readers.add(path)
    assert readers == {READER_OF_ENVIRONMENT}


@pytest.mark.parametrize("path", sorted(ROOT.glob("launch/*.py")), ids=name_of)
def test_launch_scripts_are_thin(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
