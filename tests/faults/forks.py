"""A process that has imported everything, so that each of its forks is a program that starts in milliseconds."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spin.alignment.core.program import end_with_parent
from spin.alignment.pipeline import start_server

# Of the process that forks. Arrow's allocator, which it does not use, would start a thread.
ENVIRONMENT = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}


def import_everything() -> None:
    """Make this process ready to fork.

    Raises:
        RuntimeError: its forks would differ from new processes.
    """
    has_gpu = start_server.import_libraries()
    importlib.import_module("transformers.models.llama.modeling_llama")
    problem = start_server.fork_problem(has_gpu)
    if problem is not None:
        raise RuntimeError(problem)
    gc.collect()
    gc.freeze()  # a collection in a fork would read, and so copy, everything imported here


def in_fork(work: Callable[[], Any]) -> int:
    """Do something in a fork and return its exit code: torch would start threads in this process, which no fork survives."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def print_reports(reports: Callable[[str, Mapping[str, Any], Path, int], Iterator[dict[str, Any]]]) -> None:
    """Be the main function of a module that injects faults: for each part of a plan, print its reports as lines of JSON.

    The argument of the command is ``{"parts": {name: plan}, "root": folder, "seed": number}``.
    """
    settings = json.loads(sys.argv[1])
    end_with_parent()
    import_everything()
    root = Path(settings["root"])
    root.mkdir(parents=True, exist_ok=True)
    for part, plan in settings["parts"].items():
        for report in reports(part, plan, root, settings["seed"]):
            sys.stdout.write(json.dumps({"part": part, **report}) + "\n")
            sys.stdout.flush()
    os._exit(0)  # without freeing everything that was imported
