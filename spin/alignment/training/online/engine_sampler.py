"""Sampling with an engine beside the training processes, to which the policy's weights are sent."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spin.alignment.core.memory_folder import MemoryFolder
from spin.alignment.generation.base import PromptRequest, SamplingConfig
from spin.alignment.models.adapters import adapter_config, write_adapter
from spin.alignment.models.sharded import adapter_weights, has_stored_names, whole_weights
from spin.alignment.training.online.policy_sampler import OverlappingSampler, Rows
from spin.alignment.training.online.sharers import Sharers


class EngineSampler(OverlappingSampler):
    """Samples with an engine beside the training processes, to which the policy's weights, or only its adapter's, are sent."""

    def __init__(
        self,
        engine: Any | None,
        policy: Any,
        dtype: torch.dtype,
        sharers: Sharers | None = None,
        only_adapter: bool = False,
    ) -> None:
        """``engine`` is a backend with ``load(weights)``, ``reload(folder)``, ``load_adapter(folder)``, ``sleep()`` and
        ``cancel()``; None in a process whose engine is that of another of its ``sharers``. Weights are sent as ``dtype``.
        ``only_adapter``: the engine has the weights below the policy's LoRA adapter, and applies it next to them."""
        super().__init__()
        self._engine, self._policy, self._dtype, self._sharers = engine, policy, dtype, sharers
        self._only_adapter = only_adapter
        self._memory: MemoryFolder | None = None

    def refresh(self) -> None:
        """Send the policy's weights to the engine, which also invalidates its prompt cache. Every process must call it."""
        self._check_idle()
        if not has_stored_names(self._policy):
            self._reload()
            return
        source = adapter_weights if self._only_adapter else whole_weights
        weights = ((name, weight.to(self._dtype)) for name, weight in source(self._policy))
        if self._engine is None:  # takes part in gathering them
            for _ in weights:
                pass
        elif self._only_adapter:
            with self._folder() as folder:
                write_adapter(Path(folder), adapter_config(self._policy), weights)
                self._engine.load_adapter(folder)
        else:
            self._engine.load(weights)

    def _reload(self) -> None:
        """Write the weights to a folder in memory as a model, as they are named there, for the engine to reload."""
        if self._engine is None:
            return
        with self._folder() as folder:
            save_weights(self._policy, Path(folder), self._dtype)
            self._engine.reload(folder)

    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        """Return a new folder in memory, to be removed once the engine has read it."""
        self._memory = self._memory or MemoryFolder("spin-policy-")
        return tempfile.TemporaryDirectory(dir=self._memory.path)

    def respond(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> Rows:
        """Generate with the engine, which then gives its memory back. Every process must call it."""
        if self._sharers is None:
            assert self._engine is not None
            return self._answer(requests, sampling)
        together = self._sharers.gather(requests)
        return self._sharers.scatter(self._answer(together, sampling) if self._engine is not None else [])

    def start(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> None:
        """Begin to generate with the engine; requests of its other sharers are gathered first."""
        together = requests if self._sharers is None else self._sharers.gather(requests)
        if self._engine is not None:
            self._start(lambda: self._answer(together, sampling))

    def finish(self) -> Rows:
        """Return this process's responses. An engine does not lose its weights: it would end, which is raised."""
        rows = self._finish() if self._engine is not None else []
        return rows if self._sharers is None else self._sharers.scatter(rows)

    def _answer(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> Rows:
        assert self._engine is not None
        responses: Rows = self._engine.generate(requests, sampling)
        self._engine.sleep()
        return responses

    def close(self) -> None:
        """Shut the engine down, also in the middle of a batch."""
        if self._engine is not None:
            self._engine.cancel()
            self._abandon()
            self._engine.close()
        if self._memory is not None:
            self._memory.close()


def save_weights(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Save a module's weights to a folder as a model, in the precision ``dtype``."""
    model.save_pretrained(folder, state_dict={name: weight.to(dtype) for name, weight in model.state_dict().items()})
