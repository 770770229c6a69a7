"""Starts the program of a task on this machine: what ``spin run`` itself does when the program runs on its own machine.

    python -m spin.alignment.pipeline.clusters.node TASK_FOLDER RANK

The program is started, logged, watched and ended as on one machine (``pipeline/processes.py``); its log is in the run directory.
Standard output has what the user is shown. When the task is cancelled or its machine is lost, the program ends with this process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from spin.alignment.core.program import EXIT_INTERNAL_ERROR, EXIT_INTERRUPTED, Interrupts, end_with_parent
from spin.alignment.pipeline.clusters.task import Task
from spin.alignment.pipeline.processes import ChildPrograms, ProgramStalled
from spin.alignment.pipeline.start_programs import PLAIN_STARTS_VARIABLE


def run_task(task: Task, rank: int) -> int:
    """Run the program of a task on this machine, the ``rank``-th of its group; return its exit code, also written to a file."""
    code, reason = EXIT_INTERRUPTED, ""
    try:
        task.mark_started(rank)
        # A server that forks programs is of no use to a process that starts only one.
        os.environ[PLAIN_STARTS_VARIABLE] = "1"
        children = ChildPrograms(
            task.run_dir, one_thread=False, prefix=task.shows_name, stall_timeout=task.stall_timeout
        )
        code = children.run(task.log_name(rank), task.program.command(task.meet(rank)), task.watched)
    except (ProgramStalled, TimeoutError) as error:
        code, reason = EXIT_INTERNAL_ERROR, str(error)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    finally:
        task.mark_ended(rank, code, reason)
    return code


def main() -> None:
    end_with_parent()
    Interrupts(exits_when_repeated=False).install()
    task, rank = Task.read(Path(sys.argv[1])), int(sys.argv[2])
    os.chdir(task.cwd)
    code = run_task(task, rank)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
