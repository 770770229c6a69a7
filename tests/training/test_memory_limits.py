"""The memory that a process may use, from the machine and its control groups, and the advice when it is full."""

import pytest
import torch

from spin.alignment.core.errors import InputError
from spin.alignment.training.memory import estimate as memory
from spin.alignment.training.memory.advice import advise_when_memory_is_full
from spin.alignment.training.memory.estimate import (
    available_bytes,
)


def test_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(memory, "_control_group_bytes", lambda membership, root: 8e9)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 20_000_000_000}))
    assert available_bytes(torch.device("cpu")) == 8_000_000_000
    assert available_bytes(torch.device("cpu"), local_processes=4) == 2_000_000_000
    monkeypatch.setattr(memory, "_control_group_bytes", lambda membership, root: float("inf"))
    assert available_bytes(torch.device("cpu"), local_processes=4) == 5_000_000_000


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.mark.parametrize(
    "membership, groups, free",
    [
        ("0::/job/step", {"job": ("max", 0, 0), "job/step": (1000, 600, 100)}, 500),
        ("0::/job/step", {"job": (800, 700, 0), "job/step": (1000, 600, 100)}, 100),  # the parent's limit is nearer
        ("0::/elsewhere", {"": (1000, 300, 0)}, 700),  # inside a container the name may not exist
        ("0::/job", {"job": ("max", 10, 0)}, float("inf")),
    ],
)
def test_limits_of_control_groups(tmp_path, membership, groups, free):
    (tmp_path / "membership").write_text(membership + "\n")
    for name, (limit, used, cache) in groups.items():
        stat = f"anon 5\ninactive_file {cache}"
        write(tmp_path / "fs" / name, memory__max=limit, memory__current=used, memory__stat=stat)
    assert memory._control_group_bytes(tmp_path / "membership", tmp_path / "fs") == free


def test_limits_of_older_control_groups(tmp_path):
    (tmp_path / "membership").write_text("4:cpu,cpuacct:/job\n3:memory:/job\n")
    files = {"memory__limit_in_bytes": 900, "memory__usage_in_bytes": 500, "memory__stat": "total_inactive_file 50"}
    write(tmp_path / "fs" / "memory" / "job", **files)
    assert memory._control_group_bytes(tmp_path / "membership", tmp_path / "fs") == 450
    assert memory._control_group_bytes(tmp_path / "nothing", tmp_path / "fs") == float("inf")


@pytest.mark.parametrize(
    ("budget", "longest", "checkpointing", "sentence"),
    [
        (4096, 900, False, "at most 4096 tokens: run again with --max_tokens_per_batch=2048; the training resumes"),
        (4096, 3000, False, "max_tokens_per_batch=3000"),
        (900, 900, False, "gradient_checkpointing=true"),
        (0, 900, False, "at most 900 tokens: run again with --gradient_checkpointing=true"),
        (900, 900, True, "8-bit optimiser"),
    ],
)
def test_advice_when_the_memory_is_full(budget, longest, checkpointing, sentence):
    for error in (lambda: torch.empty(2**60, dtype=torch.uint8), torch.OutOfMemoryError("full"), MemoryError()):
        with (
            pytest.raises(InputError, match=sentence) as caught,
            advise_when_memory_is_full(lambda: (budget, longest), checkpointing),
        ):
            if isinstance(error, BaseException):
                raise error
            error()
        assert caught.value.__cause__ is not None


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ValueError("out of memory")])
def test_other_errors_get_no_advice(error):
    with pytest.raises(type(error)) as caught, advise_when_memory_is_full(lambda: (4096, 900), False):
        raise error
    assert caught.value is error
