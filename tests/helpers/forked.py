"""Work in forked processes, so that the imports are paid once: what they are told, how they end, and how one is killed."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn

import torch
from transformers import TrainerCallback


class KillsItself(TrainerCallback):
    """Kills its process (SIGKILL) at the end of a step; 0: never."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def fork_group(
    processes: int, work: Callable[[], object], is_killed: bool = False, environment: Mapping[str, str] | None = None
) -> None:
    """Run some work in forked processes; several are a group that meets on a free port, as a launcher's are.

    Raises:
        RuntimeError: one of them failed; of those that are to be killed: one was not.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ |= environment or {}
            if processes > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                os.environ |= {name: str(value) for name, value in names.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            torch.set_num_threads(1)
            end_with(work)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if codes != [-signal.SIGKILL if is_killed else 0] * processes:
        raise RuntimeError(f"exit codes {codes}")


def end_with(work: Callable[[], object]) -> NoReturn:
    """Do the work of a forked process and end it: with exit code 0, or 1 after a traceback."""
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
