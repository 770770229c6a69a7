"""A task of a cluster: one program on one machine, or on several at once, described by files that all machines can read.

The folder of a task is inside the run directory, which every machine shares. ``spin run`` writes ``task.json``; the process that
starts the program on a machine (``clusters/node.py``) writes ``started-RANK`` when it begins, its output, and ``ended-RANK.json``
when the program has ended. A task without the last file was lost with its machine. Once the folder has been removed, nobody waits
for the task any more.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json, write_json_atomic
from spin.alignment.core.project_version import difference, project_version
from spin.alignment.pipeline.stage_program import Node, StageProgram

TASKS_FOLDER = ".cluster"  # in the run directory
ADDRESS_VARIABLE = "SPIN_NODE_ADDRESS"  # under which other machines reach this one
_MEETING_SECONDS = 600.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """A program, and what the process that starts it on a machine has to know. All paths are absolute.

    Attributes:
        name: of the logs: the stage and the number of the worker; of a group, that of each machine is added to it.
        program: with the processes of this task only.
        cwd: folder that relative paths of the arguments start from.
        watched: folder whose changing files are progress, or None.
        shows_name: whether the lines on the terminal start with the name.
    """

    name: str
    folder: Path
    program: StageProgram
    run_dir: Path
    cwd: Path
    watched: Path | None
    stall_timeout: float
    shows_name: bool

    @property
    def processes_per_node(self) -> int:
        return self.program.processes // self.program.nodes

    def log_name(self, rank: int) -> str:
        return self.name if self.program.nodes == 1 else f"{self.name}.{rank}"

    def write(self) -> None:
        """Write ``task.json`` into a new folder."""
        self.folder.mkdir(parents=True)
        values = {**dataclasses.asdict(self), "version": project_version()}
        write_json_atomic(
            self.folder / "task.json",
            {key: str(value) if isinstance(value, Path) else value for key, value in values.items()},
        )

    @classmethod
    def read(cls, folder: Path) -> Task:
        """Read the task in a folder.

        Raises:
            InputError: another version of this project has written it.
        """
        values = read_json(folder / "task.json")
        if problem := difference(project_version(), str(values.pop("version", "of another version"))):
            raise InputError(f"the machine {socket.gethostname()} {problem}")
        paths = {name: Path(values[name]) for name in ("folder", "run_dir", "cwd")}
        watched = None if values["watched"] is None else Path(values["watched"])
        return cls(**{**values, **paths, "watched": watched, "program": StageProgram(**values["program"])})

    def outputs(self) -> list[Path]:
        """Return the files with what the programs show on the terminal, so far."""
        return sorted(self.folder.glob("output*"))

    def has_started(self) -> bool:
        return any(self.folder.glob("started-*"))

    def endings(self) -> dict[int, dict[str, Any]]:
        """Return the exit code of each machine that reported one, and the reason if it has no other; by rank."""
        found = {}
        for path in self.folder.glob("ended-*.json"):
            try:
                found[int(path.stem.rpartition("-")[2])] = read_json(path)
            except InputError:  # the disk of a lost machine
                continue
        return found

    def meet(self, rank: int) -> Node:
        """Return this machine's place in the group; the first machine chooses the address and port, the others wait for it.

        Raises:
            TimeoutError: the first machine does not start.
        """
        count, path = self.program.nodes, self.folder / "meeting.json"
        if count == 1:
            return Node()
        if rank == 0:
            write_json_atomic(path, {"address": own_address(), "port": free_port()})
        deadline = time.monotonic() + _MEETING_SECONDS
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the first machine of {self.name} did not start within {_MEETING_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)
        return Node(rank=rank, count=count, **json.loads(path.read_text(encoding="utf-8")))


def forget_tasks(run_dir: Path) -> None:
    """Remove the folders of all tasks of a run, which ends those that a lost `spin run` has left within some seconds."""
    # A file that a lost machine has open may stay; new tasks have folders of their own.
    shutil.rmtree(run_dir / TASKS_FOLDER, ignore_errors=True)


def mark_started(folder: Path, rank: int) -> None:
    """Note that the program of the task in a folder starts on a machine of its group."""
    (folder / f"started-{rank}").touch()


def mark_ended(folder: Path, rank: int, code: int, reason: str = "") -> None:
    """Note the program's exit code there, and why it was ended if it has no other reason; unless nobody waits for it."""
    if folder.is_dir():
        write_json_atomic(folder / f"ended-{rank}.json", {"code": code, "reason": reason})


def own_address() -> str:
    """Return the address under which other machines of the cluster reach this one."""
    return os.environ.get(ADDRESS_VARIABLE) or socket.gethostname()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
