"""Imports run strictly downward through the packages, and no module is part of an import circle, types included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from scripts.make_docs import LAYERS
from tests.helpers import REPOSITORY

LEVEL = {package: level for level, row in enumerate(LAYERS) for package in row}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in (REPOSITORY / "spin").rglob("*.py")}


def imports_of(name: str, path: Path) -> set[str]:
    """Return every module of the project that a module names in an import, wherever the statement stands.

    Imports inside functions and under TYPE_CHECKING count: a reader follows them like any other.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import: name the module in full"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module or "")
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {module for module in found if module in MODULES and module != name}


GRAPH = {name: imports_of(name, path) for name, path in sorted(MODULES.items())}


def package(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if parts[:2] == ["spin", "alignment"] and len(parts) > 2 else None


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            start = stack.index(module)
            component = stack[start:]
            del stack[start:]
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports that do not run strictly downward."""
    wrong = []
    for module, others in graph.items():
        here = package(module)
        for other in sorted(others):
            there = package(other)
            if here is not None and (there is None or (there != here and LEVEL[there] >= LEVEL[here])):
                wrong.append(f"{module} imports {other}")
    return wrong


def test_every_module_is_in_a_package_of_the_table():
    packages = {package(module) for module in MODULES} - {None}
    assert packages == set(LEVEL)
    flat = [path.name for path in (REPOSITORY / "spin" / "alignment").glob("*.py")]
    assert flat == ["__init__.py"]


def test_imports_run_strictly_downward():
    assert upward(GRAPH) == []


def test_there_is_no_import_circle():
    assert circles(GRAPH) == []


@pytest.mark.parametrize(
    ("extra", "upward_count", "circle_count"),
    [
        (("spin.alignment.core.errors", "spin.alignment.training.trainer"), 1, 1),
        (("spin.alignment.data.rows", "spin.alignment.models.loading"), 1, 0),
        (("spin.alignment.core.errors", "spin.alignment.core.program"), 0, 1),
    ],
)
def test_the_checks_see_a_planted_import(extra, upward_count, circle_count):
    importer, imported = extra
    graph = {**GRAPH, importer: GRAPH[importer] | {imported}}
    assert len(upward(graph)) == upward_count
    assert len(circles(graph)) == circle_count
