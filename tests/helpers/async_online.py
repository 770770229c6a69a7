"""A sampler with a copy of the policy's weights, which samples in a thread: responses depend on weights and seeds only.

    python -m tests.helpers.async_online '[[2, "CONFIG.yaml", 0], ...]'

trains with it, in so many forked processes (gloo, DDP), which are killed after a step (0: not at all).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from spin import run_online
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.transformers.backend import TransformersBackend
from spin.alignment.models.sharded import whole_weights
from spin.alignment.training.online import trainer
from spin.alignment.training.online.policy_sampler import OverlappingSampler
from tests.helpers.forked import end_with

# Makes the settings of an online training acceptable; nothing is sent there.
OVERLAPPING = {"backend": "openai", "server_url": "http://127.0.0.1:1/v1", "async_steps": 1}


class SnapshotSampler(OverlappingSampler):
    """Samples with the weights of the last refresh, whatever becomes of the policy's."""

    def __init__(self, policy: Any, source: Any, encoder: Any) -> None:
        super().__init__()
        folder = source.model_name_or_path
        self._policy = policy
        self._own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        settings = BackendSettings(folder, stop_ids=encoder.stop_ids, pad_id=encoder.pad_id, decode=encoder.decode)
        self._backend = TransformersBackend(settings, self._own)
        self.calls: list[str] = []

    def refresh(self):
        self._check_idle()
        self.calls.append("refresh")
        self._own.load_state_dict({name: weight.clone() for name, weight in whole_weights(self._policy)}, strict=False)

    def respond(self, requests, sampling):
        self.calls.append("respond")
        return self.generate(requests, sampling)

    def generate(self, requests, sampling):
        return self._backend.generate(requests, sampling)

    def start(self, requests, sampling):
        self.calls.append("start")
        self._start(lambda: self.generate(requests, sampling))

    def finish(self):
        self.calls.append("finish")
        return self._finish()

    def close(self):
        self._abandon()


def make_snapshot_sampler(model: Any, source: Any, args: Any, encoder: Any, *_: Any) -> SnapshotSampler:
    """Stands in for ``make_sampler``."""
    return SnapshotSampler(model, source, encoder)


class KillsItself(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(config: str, kill_after: int) -> None:
    """Run the program in this process."""
    trainer.make_sampler = make_snapshot_sampler
    plain = trainer.OnlineTrainer.__init__

    def patched(self, *arguments, **settings):
        plain(self, *arguments, callbacks=[KillsItself(kill_after)], **settings)

    trainer.OnlineTrainer.__init__ = patched
    run_online.main([config])


def fork_all(processes: int, config: str, kill_after: int) -> None:
    """Run one training in forked processes; raise unless all end as they should."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {name: str(value) for name, value in names.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            torch.set_num_threads(1)
            end_with(lambda: train(config, kill_after))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if codes != [-signal.SIGKILL if kill_after else 0] * processes:
        raise RuntimeError(f"{config}: exit codes {codes}")


if __name__ == "__main__":
    for entry in json.loads(sys.argv[1]):
        fork_all(*entry)
