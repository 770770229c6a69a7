"""A Slurm of one machine for tests: sbatch, srun, scancel, squeue and scontrol with the options that this project uses.

``install(folder)`` writes the commands; those in ``folder/bin`` share the jobs in ``folder/jobs``. A job survives its sbatch.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers import REPOSITORY

COMMANDS = ("sbatch", "srun", "scancel", "squeue", "scontrol")


def install(folder: Path) -> Path:
    """Write the commands; return the folder to put on PATH."""
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    (folder / "jobs").mkdir()
    for name in COMMANDS:
        path = binaries / name
        path.write_text(
            f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -S {__file__} {folder / "jobs"} {name} "$@"\n'
        )
        path.chmod(0o755)
    return binaries


def jobs_of(folder: Path) -> dict[str, dict]:
    """Return every job that was submitted, by number: its name, options, process and whether it runs."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "jobs").glob("*.json"))}
    return {number: {**job, "runs": _runs(job["pid"])} for number, job in found.items()}


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    options = list(itertools.takewhile(lambda word: word.startswith("--"), words))
    return dict(word[2:].partition("=")[::2] for word in options), words[len(options) :]


def sbatch(jobs: Path, words: list[str]) -> int:
    options, (script, *_) = _options(words)
    if options.get("partition") == "nowhere":
        sys.stderr.write("sbatch: error: invalid partition specified: nowhere\n")
        return 1
    number = str(len(list(jobs.glob("*.json"))) + 1)
    environment = {
        **os.environ,
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NUM_NODES": options["nodes"],
        "PATH": f"{jobs.parent / 'bin'}:{os.environ['PATH']}",
    }
    with Path(options["output"].replace("%%", "%")).open("wb") as output:
        job = subprocess.Popen(
            ["sh", script], cwd=options["chdir"], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    (jobs / f"{number}.json").write_text(json.dumps({"name": options["job-name"], "pid": job.pid, "options": options}))
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()
    return job.wait() & 0xFF if "wait" in options else 0


def srun(jobs: Path, words: list[str]) -> int:
    _, command = _options(words)
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    places = [{"SLURM_PROCID": str(rank), "SPIN_NODE_ADDRESS": "127.0.0.1"} for rank in range(nodes)]
    started = [subprocess.Popen(command, env={**os.environ, **place}) for place in places]

    def end(*_: object) -> None:
        for process in started:
            process.terminate()

    signal.signal(signal.SIGTERM, end)
    while any(process.poll() is None for process in started):
        if any(process.poll() for process in started):  # --kill-on-bad-exit
            end()
        time.sleep(0.05)
    return max(code if code >= 0 else 128 - code for code in (process.returncode for process in started))


def _chosen(jobs: Path, options: dict[str, str], numbers: list[str]) -> dict[str, dict]:
    wanted = {*numbers, *filter(None, options.get("jobs", "").split(","))}
    return {
        number: job
        for number, job in jobs_of(jobs.parent).items()
        if job["runs"] and (number in wanted or job["name"] == options.get("name"))
    }


def scancel(jobs: Path, words: list[str]) -> int:
    options, numbers = _options(words)
    number = signal.SIGKILL if options.get("signal") == "KILL" else signal.SIGTERM
    for job in _chosen(jobs, options, numbers).values():
        os.killpg(job["pid"], number)
    return 0


def squeue(jobs: Path, words: list[str]) -> int:
    sys.stdout.write("".join(f"{number}\n" for number in _chosen(jobs, _options(words)[0], [])))
    return 0


def scontrol(jobs: Path, words: list[str]) -> int:
    sys.stdout.write("JobState=FAILED NodeList=node7\n")
    return 0


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[2]](Path(sys.argv[1]), sys.argv[3:]))
