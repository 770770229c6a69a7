"""``module:function`` names: found from the current folder, refused in one sentence."""

from __future__ import annotations

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_file
from spin.alignment.core.resolve import module_files, module_record, resolve
from spin.alignment.methods.losses import LOSSES, find_loss
from spin.alignment.methods.pairings import find_pairing
from spin.alignment.methods.weightings import Compares, find_weighting

SOURCE = """
NUMBER = 3
def one(rows): return rows
def two(rows, more): return rows
class Deep:
    @staticmethod
    def inside(rows): return rows
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["elsewhere"])
    monkeypatch.delitem(__import__("sys").modules, "own_resolved", raising=False)
    path = tmp_path / "own_resolved.py"
    path.write_text(SOURCE)
    return path


def test_names_are_looked_up_first_and_then_imported(module):
    assert resolve({"a": 1}, "a", "pairing", ("rows",)) == 1
    assert resolve({"a": 1}, "own_resolved:one", "pairing", ("rows",))([4]) == [4]
    assert resolve({"a": 1}, "own_resolved:Deep.inside", "pairing", ("rows",))([5]) == [5]
    assert module_files("own_resolved:one", "a") == {"own_resolved": module}
    assert module_record("pairing", "own_resolved:one") == {"pairing_module_own_resolved": hash_file(module)}
    assert module_record("pairing", "a") == {}


def test_a_plain_function_is_a_loss_a_pairing_and_a_weighting(module):
    loss, pairing, weighting = (find("own_resolved:one") for find in (find_loss, find_pairing, find_weighting))
    assert (loss.labels, loss.responses, loss.needs_reference) == ((), ("chosen", "rejected"), True)
    assert (pairing.adds, pairing.needs, pairing.needs_ground_truth, pairing.prefers) == ((), (), True, True)
    assert weighting.compares is Compares.NOTHING
    assert find_loss("sigmoid") is LOSSES["sigmoid"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "hinged",
            "unknown loss_type 'hinged': choose one of hinge, .*, or write module:function; did you mean 'hinge'",
        ),
        ("no_such_module_here:f", r"no_such_module_here of loss_type .* cannot be imported \(ModuleNotFoundError"),
        ("own_resolved:three", "module own_resolved has no three: correct the loss_type"),
        ("own_resolved:NUMBER", "NUMBER of loss_type 'own_resolved:NUMBER' is not callable"),
        ("own_resolved:two", r"does not take one positional argument: define it as two\(inputs\)"),
        ("own_resolved:", "does not name a function: write module:function"),
    ],
)
def test_other_names_are_refused(module, name, sentence):
    with pytest.raises(InputError, match=sentence):
        find_loss(name)
