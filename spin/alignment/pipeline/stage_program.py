"""A program of a stage: what it is, how it is spread over processes, and the command that starts it on a machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spin.alignment.pipeline.processes import launcher_command, python_command
from spin.alignment.pipeline.start_programs import PROGRAMS

# One process; processes that share work through lease files, any of which may die; processes that talk to each other.
Spread = Literal["one", "workers", "group"]


@dataclass(frozen=True)
class Node:
    """A machine of a group: ``rank`` of ``count``, and where the processes of all of them meet (on the machine of rank 0)."""

    rank: int = 0
    count: int = 1
    address: str = ""
    port: int = 0


@dataclass(frozen=True)
class StageProgram:
    """A program and what it needs, on whichever machine it runs.

    Attributes:
        name: file in the package, such as ``generate.py``.
        arguments: of its command line.
        spread: what its processes are to each other.
        processes: on all machines together.
        nodes: machines of a group.
        gpus: GPUs of each process.
        config_file: configuration of accelerate launch for several processes, or None.
    """

    name: str
    arguments: Sequence[str]
    spread: Spread = "one"
    processes: int = 1
    nodes: int = 1
    gpus: int = 0
    config_file: str | None = None

    def command(self, node: Node | None = None) -> list[str]:
        """Return the command that starts the program's processes on one machine of a group; by default, all on this one.

        One process without ``config_file`` is plain Python, anything else accelerate launch.
        """
        path = str(PROGRAMS / self.name)
        if self.processes == 1 and self.config_file is None:
            return python_command(Path(path), self.arguments)
        node = node or Node()
        flags = [f"--num_processes={self.processes}"]
        if self.config_file is not None:
            flags.append(f"--config_file={self.config_file}")
        else:
            # --multi_gpu makes accelerate start N processes on this machine; without GPUs they run on the CPU.
            flags += ["--multi_gpu", f"--num_machines={node.count}", "--mixed_precision=no", "--dynamo_backend=no"]
            flags += ["--main_process_port=0"] if node.count == 1 else []
        if node.count > 1:
            flags += _group_flags(node, has_file=self.config_file is not None)
        return launcher_command([*flags, path, *self.arguments])

    def workers(self) -> list[StageProgram]:
        """Return the programs that can be placed independently: each worker by itself, anything else as a whole."""
        if self.spread != "workers":
            return [self]
        alone = dataclasses.replace(self, spread="one", processes=1, nodes=1, config_file=None)
        return [alone] * self.processes


def _group_flags(node: Node, has_file: bool) -> list[str]:
    """Return the flags of accelerate for one machine of several, which win over those of its configuration file."""
    flags = [f"--num_machines={node.count}"] if has_file else []
    flags += [f"--machine_rank={node.rank}", "--same_network", "--rdzv_backend=static"]
    flags += [f"--main_process_ip={node.address}", f"--main_process_port={node.port}"]
    # Otherwise DeepSpeed would start its processes on the other machines itself, through ssh.
    return [*flags, "--deepspeed_multinode_launcher=standard"]
