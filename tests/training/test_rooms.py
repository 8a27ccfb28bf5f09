"""The packages of training/ and what each may import: only itself and those before it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Lowest first. The list in training/README.md is this one.
ROOMS = (
    *("common", "data", "config", "models", "distillation", "pruning"),
    *("trainer", "evaluation", "stages", "planning", "publishing", "examples"),
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "training").rglob("*.py"))
}


def _imports(name):
    """Modules of training/ that a module imports, and whether it does so inside a function."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    inside = {id(node) for each in ast.walk(tree) if isinstance(each, ast.FunctionDef) for node in ast.walk(each)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [each if each in MODULES else node.module for each in deeper]
        else:
            continue
        yield from ((each, id(node) in inside) for each in found if each in MODULES and each != "training")


def _room(name):
    """The room of a module; None for a command."""
    parts = name.split(".")
    return parts[1] if len(parts) > 2 or (len(parts) == 2 and MODULES[name].name == "__init__.py") else None


@pytest.mark.parametrize("name", [name for name in MODULES if _room(name) is not None])
def test_a_room_imports_only_rooms_before_it(name):
    allowed = ROOMS[: ROOMS.index(_room(name)) + 1]
    assert [each for each, _ in _imports(name) if _room(each) not in allowed] == []


def test_no_module_imports_itself_in_a_circle():
    graph = {name: {each for each, _ in _imports(name)} for name in MODULES}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_the_readme_lists_the_rooms_in_order():
    text = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| \[`(\w+)/`\]\(\1/README\.md\)", text, flags=re.MULTILINE)) == ROOMS
    assert {path.parent.name for path in (ROOT / "training").glob("*/__init__.py")} == {*ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_has_a_short_readme(room):
    lines = (ROOT / "training" / room / "README.md").read_text(encoding="utf-8").splitlines()
    assert 15 <= len(lines) <= 60
