"""Sampling from a server that runs elsewhere: the policy's weights are pushed to it, and every response has their version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from spin.alignment.core.errors import InputError
from spin.alignment.core.server_link import Refused
from spin.alignment.generation.base import PromptRequest, SamplingConfig
from spin.alignment.generation.openai.backend import OpenAIBackend
from spin.alignment.generation.openai.policy_server import ADAPTER, PolicyServer
from spin.alignment.models.adapters import adapter_config
from spin.alignment.models.sharded import adapter_weights, whole_weights
from spin.alignment.training.online.policy_sampler import OverlappingSampler, Rows

_TRIES = 3  # pushes, and batches of responses, until no restart of the server disturbs one
_LOST = "see its log, and give every training a server of its own"


class ServedSampler(OverlappingSampler):
    """Samples from a vLLM server. The main process pushes weights or the adapter; every process asks for its own responses."""

    def __init__(
        self, backend: OpenAIBackend, server: PolicyServer, policy: Any, dtype: torch.dtype, only_adapter: bool = False
    ) -> None:
        """``backend`` asks the ``server``; weights are sent to it as ``dtype``. ``only_adapter``: the server has the weights
        below the policy's LoRA adapter, and applies it next to them.

        Raises:
            InputError: the server was started without what replacing weights needs.
        """
        super().__init__()
        self._backend, self._server, self._policy, self._dtype = backend, server, policy, dtype
        self._only_adapter = only_adapter
        self._version: str | None = None  # of the last push
        self._server.version()

    def refresh(self) -> None:
        """Push the policy's weights, once more if the server restarted meanwhile. Every process must call it.

        Raises:
            InputError: the server restarted every time, or does not answer.
        """
        self._check_idle()
        source = adapter_weights if self._only_adapter else whole_weights
        for _ in range(_TRIES):
            weights = ((name, weight.to(self._dtype)) for name, weight in source(self._policy))
            found: list[Any] = [None]
            if _is_main():
                found = [self._server.push(weights, adapter_config(self._policy) if self._only_adapter else None)]
            else:  # takes part in gathering them
                for _weight in weights:
                    pass
            (version,) = broadcast_object_list(found)
            if version is not None:
                self._version = version
                if self._only_adapter:
                    self._backend.use_model(f"{ADAPTER}{version}")
                return
        raise InputError(f"the server lost the policy's weights {_TRIES} times while they were sent: {_LOST}")

    def respond(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> Rows:
        """Return responses that were all sampled from the weights last pushed. Every process must call it.

        Raises:
            InputError: the server restarted during every batch, or does not answer.
        """
        for _ in range(_TRIES):
            rows = self._of_version(self._answers(requests, sampling))
            if rows is not None:
                return rows
            self.refresh()
        raise InputError(f"the server lost the policy's weights during {_TRIES} batches of responses: {_LOST}")

    def _answers(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> Rows:
        """Return the server's responses; nothing if it was restarted and no longer knows the adapter."""
        try:
            return self._backend.generate(requests, sampling)
        except Refused:
            if not self._only_adapter or self._server.version() == self._version:
                raise
            return []

    def _of_version(self, rows: Rows) -> Rows | None:
        """Return responses with the version of the weights last pushed; None if the server no longer has them."""
        # A server that restarted has the weights of its folder again.
        if not all(gather_object([self._server.version() == self._version])):
            return None
        return [[replace(response, weights_version=self._version) for response in row] for row in rows]

    def start(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> None:
        """Ask for responses from the weights last pushed."""
        self._start(lambda: self._answers(requests, sampling))

    def finish(self) -> Rows | None:
        """Return the responses, if the server had the weights last pushed all the time.

        Raises:
            InputError: the server does not answer, or answers badly.
        """
        return self._of_version(self._finish())

    def close(self) -> None:
        """Close the connections, which cancels a batch under way; the server keeps running."""
        self._backend.close()
        self._abandon()
        self._server.close()


def _is_main() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
