"""Sixteen processes that generate into one folder, eight of which are killed (the long form: 64)."""

from __future__ import annotations

import pytest

from tests.faults.__main__ import reports
from tests.faults.many_writers import PROMPTS_EACH, wrong_rows
from tests.faults.plan import SHORT

pytestmark = pytest.mark.slow


def test_many_writers_leave_what_one_alone_would(tmp_path):
    plan = SHORT["many_writers"]["writers"]
    _, killed, finished = reports("many_writers", {"writers": plan}, tmp_path)
    assert killed["count"] >= plan["kills"] and killed["wrong"] == []
    assert finished["how"] == "finished" and finished["wrong"] == []
    # The comparison itself notices a fraction that is missing.
    shared, undisturbed = tmp_path / "writers" / "shared", tmp_path / "writers" / "undisturbed"
    (shared / "train-00001.parquet").unlink()
    assert len(wrong_rows(shared, undisturbed, PROMPTS_EACH * plan["processes"])) == 2
