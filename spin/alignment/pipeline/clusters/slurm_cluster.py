"""A Slurm cluster: a task is a batch job, which starts one process on each of its machines."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import write_text_atomic
from spin.alignment.pipeline.clusters.base import ClusterSettings
from spin.alignment.pipeline.clusters.handle import Ending, Handle
from spin.alignment.pipeline.clusters.remote import NODE_MODULE, TOKEN_NAME, RemoteCluster
from spin.alignment.pipeline.clusters.task import Task
from spin.alignment.pipeline.run_sections import LaunchConfig

COMMANDS = ("sbatch", "scancel", "scontrol", "squeue")
# Options of sbatch by which `spin run` finds, follows and sizes its jobs: launch.sbatch cannot change them.
_OWN_OPTIONS = {
    "job-name",
    "output",
    "error",
    "array",
    "chdir",
    "export",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "requeue",
    "wrap",
}
_OWN_LETTERS = "JoeaDNn"
_NOT_SHARED = 66  # exit code of a job whose machine does not see the folder of the run (EX_NOINPUT of sysexits.h)
_GONE_SECONDS = 120.0
_COMMAND_SECONDS = 60.0
# srun starts this on each machine. Since Slurm 22.05 it has to be told the cores that sbatch asked for.
_SCRIPT = """#!/bin/sh
exec srun --kill-on-bad-exit=1 --cpus-per-task={cpus} sh -c '
[ "$(cat "$0/{token_name}" 2>/dev/null)" = {token} ] || exit {not_shared}
cd "$1" || exit {not_shared}
exec "$2" -m {module} "$3" "$SLURM_PROCID"
' {folders}
"""


class SlurmCluster(RemoteCluster):
    """The cluster that sbatch on this machine submits to."""

    def __init__(self, settings: ClusterSettings) -> None:
        super().__init__(settings)
        # By the name, the jobs that a killed `spin run` has left are found.
        self.job_name = "spin-" + hashlib.sha256(str(self.run_dir).encode()).hexdigest()[:12]
        self._has_jobs = False

    @classmethod
    def check(cls, launch: LaunchConfig) -> None:
        missing = [name for name in COMMANDS if shutil.which(name) is None]
        if missing:
            raise InputError(
                f"launch.cluster is slurm, but there is no command {missing[0]} here: start the run on a login node"
            )
        for option in launch.sbatch:
            name = option.removeprefix("--").partition("=")[0]
            is_letter = option[:1] == "-" != option[1:2] and option[1:2] in _OWN_LETTERS
            if is_letter or (option.startswith("--") and name in _OWN_OPTIONS):
                raise InputError(f"launch.sbatch sets {option}, which `spin run` decides for its jobs: remove it")

    def open(self) -> None:
        cancel_jobs(f"--name={self.job_name}")
        super().open()

    def close(self) -> None:
        """End jobs that an interrupt has kept from being cancelled, or that were submitted just then."""
        try:
            if self._has_jobs:
                cancel_jobs(f"--name={self.job_name}")
        except InputError as error:
            say_error(f"warning: {error}")
        super().close()

    def start(self, task: Task) -> Handle:
        self._has_jobs = True
        script = task.folder / "job.sh"
        folders = (self.folder, task.cwd, sys.executable, task.folder)
        text = _SCRIPT.format(
            cpus=self.cpus_per_node(task),
            token_name=TOKEN_NAME,
            token=self.token,
            not_shared=_NOT_SHARED,
            module=NODE_MODULE,
            folders=" ".join(shlex.quote(str(item)) for item in folders),
        )
        write_text_atomic(script, text)
        # The environment of sbatch is that of the job; what describes a job that `spin run` itself runs in is not for others.
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"
        }
        return SlurmHandle(task, self._command(task, script), {**inherited, **self.environment})

    def _command(self, task: Task, script: Path) -> list[str]:
        gpus = self.gpus_per_node(task)
        output = str(task.folder / "output").replace("%", "%%")
        return [
            *("sbatch", "--parsable", "--wait", f"--job-name={self.job_name}", "--export=ALL", "--no-requeue"),
            *(f"--nodes={task.program.nodes}", "--ntasks-per-node=1", f"--cpus-per-task={self.cpus_per_node(task)}"),
            *([f"--gpus-per-node={gpus}"] if gpus else []),
            *(f"--output={output}", f"--chdir={task.cwd}"),
            *self.settings.launch.sbatch,
            str(script),
        ]


class SlurmHandle(Handle):
    """A job, followed by the sbatch that submitted it and waits for its end."""

    def __init__(self, task: Task, command: Sequence[str], environment: dict[str, str]) -> None:
        self._answers = {name: task.folder / f"sbatch-{name}" for name in ("out", "err")}
        with self._answers["out"].open("wb") as out, self._answers["err"].open("wb") as err:
            # A session of its own: Ctrl-C in the terminal is for `spin run`, which then cancels the job.
            self._sbatch = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
            )
        self._is_unwanted = False  # to be cancelled, as soon as it has a number

    def job(self) -> str | None:
        """Return the number of the job, once it has been submitted."""
        said = self._answers["out"].read_text(encoding="utf-8", errors="replace")
        first, end, _ = said.partition("\n")
        return first.partition(";")[0].strip() if end else None

    def poll(self) -> Ending | None:
        code = self._sbatch.poll()
        if code is None:
            self._cancel_if_known()
            return None
        job = self.job()
        if job is None:
            said = " ".join(self._answers["err"].read_text(encoding="utf-8", errors="replace").split())
            return Ending(False, refusal=f"sbatch refused a job ({said or f'exit code {code}'}): see launch.sbatch")
        if code == _NOT_SHARED:
            return Ending(
                False,
                refusal=f"the machine of Slurm job {job} ({node_of(job)}) does not see the folder of the run: run_dir, data and "
                "the current folder must be on a disk that every machine mounts at the same path",
            )
        if code:
            cancel_jobs(job)  # sbatch may have ended without its job
        return Ending(code == 0, f"Slurm job {job} ended with exit code {code}" if code else "")

    def cancel(self) -> None:
        self._is_unwanted = True
        self._cancel_if_known()

    def _cancel_if_known(self) -> None:
        if self._is_unwanted and (job := self.job()) is not None:
            self._is_unwanted = ask("scancel", job).code != 0  # if Slurm does not answer, asked again

    def kill(self) -> None:
        if (job := self.job()) is not None:
            ask("scancel", "--signal=KILL", job)
        self._sbatch.kill()
        self._sbatch.wait()


@dataclass(frozen=True)
class Answer:
    """What a command of Slurm said, and its exit code; -1 if it did not answer in time."""

    code: int
    said: str
    complaint: str


def ask(*command: str) -> Answer:
    """Run a command of Slurm."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return Answer(-1, "", f"{command[0]} does not answer within {_COMMAND_SECONDS:.0f} s")
    return Answer(done.returncode, done.stdout.strip(), " ".join(done.stderr.split()))


def node_of(job: str) -> str:
    """Return the machines that a job ran on, as Slurm names them."""
    found = [word for word in ask("scontrol", "show", "job", job).said.split() if word.startswith("NodeList=")]
    return found[0].partition("=")[2] if found else "unknown"


def cancel_jobs(which: str) -> None:
    """Cancel jobs, given by number or as an option of scancel and squeue, and wait until none is left.

    Raises:
        InputError: they do not end, or Slurm does not answer.
    """
    option = which if which.startswith("--") else f"--jobs={which}"
    deadline = time.monotonic() + _GONE_SECONDS
    while True:
        left = ask("squeue", "--noheader", "--me", "--format=%i", option)
        if "Invalid job id" in left.complaint or not (
            left.code or left.said
        ):  # it has forgotten the job, or none is left
            return
        if time.monotonic() > deadline:
            raise InputError(
                f"Slurm does not say whether jobs of an earlier attempt are left ({left.complaint}): run again when it does"
                if left.code
                else f"the Slurm job {left.said.split()[0]} of an earlier attempt does not end: cancel it, and run again"
            )
        if not left.code:
            ask("scancel", *left.said.split())
        time.sleep(1.0)
