"""Programs start plainly where the start server cannot serve them, and which commands it serves."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from spin.alignment.pipeline import start_programs, start_server
from spin.alignment.pipeline.start_programs import PLAIN_STARTS_VARIABLE, ProgramStarter, is_served
from tests.helpers import REPOSITORY, program_environment, run_command
from tests.pipeline.test_start_server import run, write


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder that stands for the folder of programs."""
    found = tmp_path / "programs"
    found.mkdir()
    monkeypatch.setattr(start_programs, "PROGRAMS", found)
    return found


def test_plain_starts_can_be_asked_for(folder, tmp_path):
    starter = ProgramStarter(program_environment(**{PLAIN_STARTS_VARIABLE: "1"}))
    assert run(starter, write(folder, "raise SystemExit(3)"), tmp_path)[0] == 3
    assert starter.server_pid is None and PLAIN_STARTS_VARIABLE in starter.problem


@pytest.mark.parametrize(
    ("server", "problem"),
    [
        ("raise SystemExit(1)", "ended before it was ready"),
        (
            'import socket, sys\ns = socket.socket(fileno=int(sys.argv[1]))\ns.send(b\'{"problem": "3 threads"}\')',
            "3 threads",
        ),
        (
            "import socket, sys\ns = socket.socket(fileno=int(sys.argv[1]))\ns.send(b'{\"problem\": null}')\ns.recv(9999)",
            "could not start",
        ),
        (
            "import socket, sys\ns = socket.socket(fileno=int(sys.argv[1]))\ns.send(b'{\"problem\": null}')\ns.close()",
            "does not answer|could not start",
        ),
    ],
)
def test_without_a_server_programs_start_plainly(folder, tmp_path, monkeypatch, server, problem):
    import re

    monkeypatch.setattr(start_programs, "_SERVER", server)
    starter = ProgramStarter(program_environment())
    command = write(folder, "print('here'); raise SystemExit(3)")
    for _ in range(2):
        with (tmp_path / "out").open("w+") as out:
            assert starter.start(command, out.fileno(), out.fileno(), tmp_path).wait(60) == 3
            out.seek(0)
            assert out.read() == "here\n"
    assert re.search(problem, starter.problem)


def test_a_process_that_is_not_safe_to_fork_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert "initialised CUDA" in start_server.fork_problem(has_gpu=True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert "touched CUDA" in start_server.fork_problem(has_gpu=True)
    assert "touched CUDA" not in (
        start_server.fork_problem(has_gpu=False) or ""
    )  # a CUDA build of torch on a machine without
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert "threads" in start_server.fork_problem(has_gpu=False)
    stop.set()
    thread.join()


@pytest.mark.parametrize("has_gpu", [False, True])
def test_where_there_is_a_gpu_nothing_is_imported_that_initialises_it(monkeypatch, has_gpu):
    import torch

    asked, imported = [], []

    def is_available() -> bool:
        asked.append(os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK"))
        return has_gpu

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(start_server.importlib, "import_module", imported.append)
    monkeypatch.setattr(start_server, "build_conversion_table", lambda: None)
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    before = dict(os.environ)
    assert start_server.import_libraries() == has_gpu
    assert asked == ["1"] and dict(os.environ) == before
    assert imported[: len(start_server.LIBRARIES)] == list(start_server.LIBRARIES)
    for_training = {*start_server.TRAINING_LIBRARIES, *start_server.LIBRARIES_AT_FIRST_USE}
    assert for_training.isdisjoint(imported) if has_gpu else for_training <= set(imported)


def test_libraries_for_every_machine_do_not_load_bitsandbytes():
    """It initialises CUDA where there is a GPU."""
    code = "import sys\nfrom spin.alignment.pipeline.start_server import LIBRARIES\nimport importlib\n"
    code += "for name in LIBRARIES:\n    importlib.import_module(name)\n    assert 'bitsandbytes' not in sys.modules, name\n"
    done = run_command([sys.executable, "-c", code], PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["spin/generate.py", "--model", "m"], True),
        (["spin/run_online.py", "transformers.yaml"], True),
        (["spin/generate.py", "--backend", "vllm"], False),
        (["spin/generate.py", "--backend=vllm"], False),
        (["spin/run_online.py", "vllm.yaml"], False),
        (["-m", "accelerate.commands.launch", "spin/run_spin.py"], False),
        (["-c", "pass", "spin/run_spin.py"], False),
        (["spin/cli.py", "run"], False),
        (["benchmarks/generate.py"], False),
        (["spin/absent.py"], False),
        ([], False),
    ],
)
def test_which_commands_are_served(tmp_path, monkeypatch, words, expected):
    for name in ("spin/generate.py", "spin/run_online.py", "spin/run_spin.py", "spin/cli.py", "benchmarks/generate.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for backend in ("vllm", "transformers"):
        (tmp_path / f"{backend}.yaml").write_text(f"beta: 0.1\nbackend: {backend}\n")
    monkeypatch.setattr(start_programs, "PROGRAMS", tmp_path / "spin")
    assert is_served([sys.executable, *words], tmp_path) is expected
    assert not is_served(["python-of-another-environment", *words], tmp_path)
