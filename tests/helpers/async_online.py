"""A sampler with a copy of the policy's weights, which samples in a thread: responses depend on weights and seeds only.

    python -m tests.helpers.async_online '[[2, "CONFIG.yaml", 0], ...]'

trains with it, in so many forked processes (gloo, DDP), which are killed after a step (0: not at all).
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from spin import run_online
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.transformers.backend import TransformersBackend
from spin.alignment.models.sharded import whole_weights
from spin.alignment.training.online import trainer
from spin.alignment.training.online.policy_sampler import OverlappingSampler
from tests.helpers.forked import KillsItself, fork_group

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


def train(config: str, kill_after: int) -> None:
    """Run the program in this process."""
    trainer.make_sampler = make_snapshot_sampler
    plain = trainer.OnlineTrainer.__init__

    def patched(self, *arguments, **settings):
        plain(self, *arguments, callbacks=[KillsItself(kill_after)], **settings)

    trainer.OnlineTrainer.__init__ = patched
    run_online.main([config])


if __name__ == "__main__":
    for processes, config, kill_after in json.loads(sys.argv[1]):
        fork_group(processes, partial(train, config, kill_after), is_killed=kill_after > 0)
