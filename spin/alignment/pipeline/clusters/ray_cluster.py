"""A Ray cluster: a task is a Ray task on one machine, or one for each machine of a placement group."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError, reason_of
from spin.alignment.core.project_version import difference, project_version
from spin.alignment.pipeline.clusters.base import ClusterSettings
from spin.alignment.pipeline.clusters.handle import Ending, Handle
from spin.alignment.pipeline.clusters.remote import NODE_MODULE, TOKEN_NAME, RemoteCluster, shared_environment
from spin.alignment.pipeline.clusters.task import ADDRESS_VARIABLE, Task
from spin.alignment.pipeline.run_sections import LaunchConfig

VERSION_MODULE = "spin.alignment.core.project_version"
_CHECK_SECONDS = 120.0
_END_SECONDS = 25.0
_POLL_SECONDS = 0.2
_SHARED = "run_dir, data and the current folder must be on a disk that every machine mounts at the same path"
_GROUP_SECONDS = 10.0  # for the other machines of a group to say why they failed too, before they are cancelled


class RayCluster(RemoteCluster):
    """The cluster that RAY_ADDRESS names, or the one that this machine is part of."""

    def __init__(self, settings: ClusterSettings) -> None:
        super().__init__(settings)
        self._is_own_connection = False

    @classmethod
    def check(cls, launch: LaunchConfig) -> None:
        if importlib.util.find_spec("ray") is None:
            raise InputError(
                "launch.cluster is ray, but Ray is not installed: pip install 'selfplay-spin[ray]' on every machine"
            )

    def open(self) -> None:
        import ray

        super().open()
        if not ray.is_initialized():  # otherwise a program that uses the Python API has connected already
            self._connect()
        self._check_nodes()

    def _connect(self) -> None:
        import ray

        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.getsignal(number) for number in numbers}
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS") or "auto", log_to_driver=False, logging_level=logging.ERROR)
            self._is_own_connection = True
        except (ConnectionError, RuntimeError, TimeoutError) as error:
            raise InputError(
                f"no Ray cluster can be reached ({reason_of(error)}): start one with `ray start --head`, or set RAY_ADDRESS"
            ) from error
        finally:
            if threading.current_thread() is threading.main_thread():  # Ray has installed handlers of its own
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    def _check_nodes(self) -> None:
        """Let every machine read the token, write next to it, and say which version of this project it has.

        Raises:
            InputError: naming the first machine that cannot take part, and why.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        look = ray.remote(look_at_machine)
        arguments = (str(self.folder), self.token, str(Path.cwd()), project_version(), shared_environment())
        asked = {}
        for node in ray.nodes():
            if node["Alive"]:
                only_there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                asking = look.options(num_cpus=0, max_retries=0, scheduling_strategy=only_there)
                asked[asking.remote(node["NodeID"], *arguments)] = node
        ray.wait(list(asked), num_returns=len(asked), timeout=_CHECK_SECONDS)
        for answer, node in asked.items():
            try:
                problem = ray.get(answer, timeout=0)
            except ray.exceptions.GetTimeoutError:
                problem = f"does not answer within {_CHECK_SECONDS:.0f} s: see its logs, or remove it from the cluster"
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                problem = f"cannot run a task of this program ({reason}): install the same version on every machine"
            if not problem and not (self.folder / f"{TOKEN_NAME}-{node['NodeID']}").is_file():
                problem = f"writes where this machine cannot see it: {_SHARED}"
            if problem:
                name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
                raise InputError(f"the Ray node {name} {problem}")

    def close(self) -> None:
        import ray

        if self._is_own_connection:
            ray.shutdown()
        super().close()

    def start(self, task: Task) -> Handle:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        cpus, gpus, nodes = self.cpus_per_node(task), self.gpus_per_node(task), task.program.nodes
        group: Any = None
        places: list[Any] = ["SPREAD"]
        if nodes > 1:
            group = ray.util.placement_group([{"CPU": cpus, "GPU": gpus}] * nodes, strategy="SPREAD")
            places = [PlacementGroupSchedulingStrategy(group, rank) for rank in range(nodes)]
        on_node = ray.remote(run_on_node)
        environment = {**shared_environment(), **self.environment}
        return RayHandle(
            [
                on_node.options(num_cpus=cpus, num_gpus=gpus, max_retries=0, scheduling_strategy=place).remote(
                    rank, str(task.folder), environment
                )
                for rank, place in enumerate(places)
            ],
            group,
        )


class RayHandle(Handle):
    """The Ray tasks of a task, one for each machine, and their placement group."""

    def __init__(self, references: Sequence[Any], group: Any) -> None:
        self._pending, self._group = list(references), group
        self._reason = ""
        self._failed_at: float | None = None
        self._is_cancelled = False

    def poll(self) -> Ending | None:
        import ray

        ready, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=0)
        for reference in ready:
            reason = _failure_of(reference)
            if reason is not None:
                self._reason = self._reason or reason
                self._failed_at = self._failed_at or time.monotonic()
        if self._pending:
            # The processes on the other machines may wait for those that have failed, for as long as they are let.
            if self._failed_at is not None and time.monotonic() - self._failed_at > _GROUP_SECONDS:
                self.cancel()
            return None
        self._leave()
        return Ending(self._failed_at is None, self._reason)

    def cancel(self) -> None:
        # Once: a second KeyboardInterrupt would end a task while it still waits for its program to end.
        if not self._is_cancelled:
            self._is_cancelled = True
            self._cancel(force=False)

    def kill(self) -> None:
        self._cancel(force=True)
        self._leave()

    def _cancel(self, force: bool) -> None:
        import ray

        for reference in self._pending:
            ray.cancel(reference, force=force)

    def _leave(self) -> None:
        import ray

        if self._group is not None:
            ray.util.remove_placement_group(self._group)
        self._group = None


def _failure_of(reference: Any) -> str | None:
    """Return why a Ray task that has ended did not succeed; None if its program did, "" if its program says so itself."""
    import ray

    try:
        return None if ray.get(reference) == 0 else ""
    except ray.exceptions.RayTaskError as error:  # its text is a traceback
        return str(error).strip().splitlines()[-1]
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[0].partition(". ")[0]


def run_on_node(rank: int, folder: str, given: Mapping[str, str]) -> int:
    """As a Ray task: run one machine's part of a task in processes of its own; return its exit code."""
    import ray

    environment = {**os.environ, **given, ADDRESS_VARIABLE: ray.util.get_node_ip_address()}
    with (Path(folder) / f"output-{rank}").open("ab") as output:
        node = subprocess.Popen(
            [sys.executable, "-m", NODE_MODULE, folder, str(rank)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
        )
    try:
        while node.poll() is None:  # a wait without a timeout would not be interrupted when the task is cancelled
            time.sleep(_POLL_SECONDS)
    finally:
        _end(node)
    return node.returncode


def _end(node: subprocess.Popen[bytes]) -> None:
    if node.poll() is None:
        node.terminate()
        try:
            node.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()


def look_at_machine(node_id: str, folder: str, token: str, cwd: str, version: str, given: Mapping[str, str]) -> str:
    """As a Ray task: return why this machine cannot take part in a run, and the fix; "" if it can."""
    try:
        found = (Path(folder) / TOKEN_NAME).read_text(encoding="ascii")
        (Path(folder) / f"{TOKEN_NAME}-{node_id}").write_text(token, encoding="ascii")
    except OSError as error:
        return f"cannot use {folder} ({error.strerror}): {_SHARED}"
    if found != token:
        return f"sees another folder as {folder}: {_SHARED}"
    if not Path(cwd).is_dir():
        return f"has no folder {cwd}: {_SHARED}"
    # Asked of a process that starts as a task's does: Ray lets its own import this project from where `spin run` has it.
    command = [sys.executable, "-m", VERSION_MODULE]
    asked = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, check=False)
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        return f"cannot start this program ({reason}): install selfplay-spin {version} there"
    return difference(asked.stdout.strip(), version)
