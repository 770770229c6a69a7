"""Runs trainings in several real processes (gloo): forked from one program, so that the imports are paid once.

    python -m tests.helpers.sharded run_online '[["FSDP2", "CONFIG.yaml", 0], ...]'

Each entry is a key of :data:`ENVIRONMENTS`, a configuration, and the step after which a process is killed (0: none).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from functools import partial

import accelerate.state
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from spin.alignment.training import trainer
from tests.helpers import fsdp_on_cpu
from tests.helpers.engine_in_process import use_engine_in_process
from tests.helpers.forked import KillsItself, fork_group

_PROCESSES = 2


def launch_environment(*arguments: str) -> dict[str, str]:
    """Return the environment that `accelerate launch` would start a program in."""
    parsed, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*arguments, "program.py"]))
    if parsed.use_deepspeed:
        parsed.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(parsed)[1]
    else:
        environment = prepare_multi_gpu_env(parsed)
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


PROGRAMS = {"run_online": "online.run", "run_spin": "preference"}  # and what they import
ENVIRONMENTS = {
    "FSDP2": ("--config_file=configs/fsdp2.yaml", f"--num_processes={_PROCESSES}", "--mixed_precision=no"),
    "ZeRO-3": ("--config_file=configs/deepspeed_zero3_cpu.yaml",),
}


def train(program: str, kind: str, config: str, kill_after: int) -> None:
    """Run a program in this process, one of those of a launch."""
    if kind == "FSDP2":
        accelerate.state.PartialState.__init__ = fsdp_on_cpu._as_if_on_gpus
    if kill_after:
        plain = trainer.SPINTrainer.__init__

        def patched(self, *arguments, **settings):
            plain(self, *arguments, **settings | {"callbacks": [KillsItself(kill_after)]})

        trainer.SPINTrainer.__init__ = patched
    use_engine_in_process()  # for backend: vllm
    importlib.import_module(f"spin.{program}").main([config])


if __name__ == "__main__":
    program = sys.argv[1]
    importlib.import_module(f"spin.alignment.training.{PROGRAMS[program]}")  # before the forks
    for kind, config, kill_after in json.loads(sys.argv[2]):
        environment = {**launch_environment(*ENVIRONMENTS[kind]), "DS_ACCELERATOR": "cpu"}
        fork_group(_PROCESSES, partial(train, program, kind, config, kill_after), kill_after > 0, environment)
