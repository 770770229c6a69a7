"""Starts the program of a task on this machine: what ``spin run`` itself does when the program runs on its own machine.

    python -m spin.alignment.pipeline.clusters.node TASK_FOLDER RANK

The program is started, logged, watched and ended as on one machine (``pipeline/processes.py``); its log is in the run directory.
Standard output has what the user is shown. When the task is cancelled, its machine is lost or its folder is removed, the program
ends with this process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.program import (
    EXIT_BAD_INPUT,
    EXIT_INTERNAL_ERROR,
    EXIT_INTERRUPTED,
    Interrupts,
    end_with_parent,
)
from spin.alignment.pipeline.clusters.task import Task, mark_ended, mark_started
from spin.alignment.pipeline.processes import ChildPrograms, ProgramStalled
from spin.alignment.pipeline.start_programs import PLAIN_STARTS_VARIABLE


def run_task(folder: Path, rank: int) -> int:
    """Run the program of the task in a folder on this machine, the ``rank``-th of its group.

    Returns:
        Its exit code, which is also written to a file: 2 for a task that cannot run here, which standard error explains; 130 if
        the task was cancelled or its folder removed.
    """
    code, reason = EXIT_INTERNAL_ERROR, ""
    try:
        task = Task.read(folder)
        os.chdir(task.cwd)
        mark_started(folder, rank)
        code = _run_program(task, rank)
    except (ProgramStalled, TimeoutError) as error:
        reason = str(error)
    except InputError as error:
        say_error(f"error: {error}")
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    finally:
        mark_ended(folder, rank, code, reason)
    return code


def _run_program(task: Task, rank: int) -> int:
    def check_wanted(stage: str, activity: str) -> None:
        # `spin run` may have been lost without its cluster noticing; whoever continues the run would write to the same files.
        if not task.folder.is_dir():
            raise KeyboardInterrupt

    # A server that forks programs is of no use to a process that starts only one.
    os.environ[PLAIN_STARTS_VARIABLE] = "1"
    children = ChildPrograms(
        task.run_dir, one_thread=False, prefix=task.shows_name, stall_timeout=task.stall_timeout, look=check_wanted
    )
    return children.run(task.log_name(rank), task.program.command(task.meet(rank)), task.watched)


def main() -> None:
    end_with_parent()
    Interrupts(exits_when_repeated=False).install()
    code = run_task(Path(sys.argv[1]), int(sys.argv[2]))
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
