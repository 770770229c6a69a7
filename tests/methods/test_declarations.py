"""What a method or a backend is, it says itself: no module asks for the name of another one's."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from spin.alignment.generation import BACKENDS
from spin.alignment.methods.losses import LOSSES
from spin.alignment.methods.pairings import PAIRINGS
from spin.alignment.methods.weightings import WEIGHTINGS
from tests.helpers import REPOSITORY

REGISTRIES = {
    "methods/losses": LOSSES,
    "methods/pairings": PAIRINGS,
    "methods/weightings": WEIGHTINGS,
    "generation": BACKENDS,
}
NAMES = {name for registry in REGISTRIES.values() for name in registry}


def compared_names(source: str) -> set[str]:
    """Return the registered names that a module compares something with: ``==``, ``!=``, ``in`` and ``case``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        else:
            continue
        for side in sides:
            texts = side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
            found |= {text.value for text in texts if isinstance(text, ast.Constant) and isinstance(text.value, str)}
    return found & NAMES


def owner(path: Path) -> set[str]:
    """Return the names that a module may ask for: those of its own file, or of the backend whose package it is in."""
    place = path.relative_to(REPOSITORY / "spin")
    parts = place.parts
    if parts[:2] == ("alignment", "generation") and len(parts) > 3:
        return {parts[2]}
    return {path.stem} if "methods" in parts else set()


def test_no_module_asks_for_the_name_of_a_method_or_backend():
    found = {
        str(path.relative_to(REPOSITORY)): compared_names(path.read_text(encoding="utf-8")) - owner(path)
        for path in (REPOSITORY / "spin").rglob("*.py")
    }
    assert len(found) > 100
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("if loss_type == 'sppo_reward': pass", {"sppo_reward"}),
        ("x = name in ('reverse_dpo', 'teacher')", {"reverse_dpo", "teacher"}),
        ("match backend:\n    case 'vllm':\n        pass", {"vllm"}),
        ("x = 'sigmoid'", set()),
    ],
)
def test_the_check_sees_a_comparison(source, found):
    assert compared_names(source) == found
