"""The prompt store of an output folder: one process writes it, the others wait and read it."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
import types

import pytest

from spin.alignment.core.provenance import Provenance
from spin.alignment.data.prompt_store import PromptStore
from spin.alignment.generation.generate import open_store
from spin.alignment.generation.leases import Worker

FORK = multiprocessing.get_context("fork")
STATED = Provenance(kind="generated", extra={"inputs": "abc"})


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Settings of an output folder; ``log`` gets a line whenever the prompts are written, which takes 0.3 s."""
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{n}", "response": "r"}) + "\n" for n in "ab")
    )
    create = PromptStore.create

    def slowly(*arguments):
        with (tmp_path / "log").open("a") as file:
            file.write("written\n")
        time.sleep(0.3)
        create(*arguments)

    monkeypatch.setattr(PromptStore, "create", slowly)
    return types.SimpleNamespace(
        input_dir=str(tmp_path / "train.jsonl"), output_dir=str(tmp_path / "out"), split="train", lease_timeout=0.3
    )


def opened(config) -> int:
    with Worker(config_parts(config) / "workers", beat=0.05) as worker:
        return len(open_store(config, STATED, worker))


def config_parts(config):
    from pathlib import Path

    return Path(config.output_dir) / ".parts"


def test_workers_that_start_together_write_the_prompts_once(config, tmp_path, capfd):
    processes = [FORK.Process(target=lambda: opened(config)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "written\n"
    assert capfd.readouterr().err.count("which reads the prompts") == 2
    assert opened(config) == 2 and (tmp_path / "log").read_text() == "written\n"
    assert not list(config_parts(config).glob("*.lease"))


def test_the_work_of_a_dead_writer_is_taken_over(config):
    parts = config_parts(config)
    parts.mkdir(parents=True)
    (parts / "prompts-train-abc.lease").write_text("far-away-1")  # it never beats
    started = time.monotonic()
    assert opened(config) == 2 and time.monotonic() - started > config.lease_timeout


def test_a_folder_that_others_have_finished_ends_the_wait(config, monkeypatch):
    parts = config_parts(config)
    with Worker(parts / "workers", beat=60) as worker:
        (parts / "prompts-train-abc.lease").write_text("far-away-1")
        monkeypatch.setattr(time, "sleep", lambda _: shutil.rmtree(parts, ignore_errors=True))
        with pytest.raises(FileNotFoundError):
            open_store(config, STATED, worker)
