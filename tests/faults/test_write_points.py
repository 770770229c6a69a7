"""Each program killed, out of space or with a flipped bit at some of its file operations."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from tests.faults.__main__ import reports
from tests.faults.plan import SHORT

pytestmark = pytest.mark.slow

PROGRAMS = SHORT["program_faults"]
FAULTS = {"kill": "kill", "full": "full", "small_disk": "small disk", "bit_flip": "bit flip"}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    by_program: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for report in reports("program_faults", PROGRAMS, tmp_path_factory.mktemp("faults")):
        by_program[report["part"]].append(report)
    return by_program


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_fault_at_a_file_operation_is_survived_or_named(found, program):
    assert [report for report in found[program] if report["wrong"]] == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_as_many_faults_as_planned_were_injected(found, program):
    operations, *faults = found[program]
    assert operations["count"] > 5 and operations["planned"] == len(faults)
    for name, count in PROGRAMS[program].items():
        assert sum(report["how"] == FAULTS[name] for report in faults) == count, name
