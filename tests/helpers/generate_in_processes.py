"""Many generate.py processes on one folder, some of them killed: python tests/helpers/generate_in_processes.py SETTINGS_JSON.

The processes are forked from this one, which has imported everything: a start costs milliseconds, so dozens of kills cost
seconds. What they say goes to the file FAKE_OUTPUT, if it is set. Prints one JSON line with what happened.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

import transformers

import spin.alignment.data.chat_encoder
import spin.alignment.generation.worker  # noqa: F401
from spin.alignment.core.program import run_program
from spin.alignment.generation import BACKENDS
from spin.generate import main
from tests.helpers.generate_with_fake import FakeBackend

transformers.AutoConfig, transformers.AutoTokenizer  # noqa: B018  (lazy: loaded by the mention)


def start(arguments: list[str]) -> int:
    """Fork a process that runs generate.py, in which the fake backend is known; return its number."""
    pid = os.fork()
    if pid:
        return pid
    BACKENDS["fake"] = FakeBackend
    code = 1
    try:
        # "a": all of them may write to one file.
        sys.stdout = sys.stderr = open(os.environ.get("FAKE_OUTPUT", os.devnull), "a")  # noqa: PTH123, SIM115
        run_program(main, arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def storm(arguments: list[str], processes: int, kills: int, seed: int) -> dict[str, object]:
    """Keep some processes at work and kill -9 one of them at random moments, each replaced by a new one.

    Nobody is killed any more after ``kills``, or once a process ends because all the work is done: later kills would hit nothing.
    """
    chance = random.Random(seed)
    alive = {start(arguments) for _ in range(processes)}
    codes: list[int] = []
    killed = 0
    while alive:
        time.sleep(chance.uniform(0.01, 0.25))
        if killed < kills and not codes and chance.random() < 0.8:
            os.kill(chance.choice(sorted(alive)), signal.SIGKILL)
        for pid in list(alive):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            alive.remove(pid)
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                killed += 1
                alive.add(start(arguments))
            else:
                codes.append(os.waitstatus_to_exitcode(status))
    return {"kills": killed, "codes": codes}


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    print(json.dumps(storm(**settings)))
