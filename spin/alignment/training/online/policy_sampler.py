"""The interface of what online training samples with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from spin.alignment.generation.base import PromptRequest, Response, SamplingConfig
from spin.alignment.training.online.background import Background

Rows = list[list[Response]]
_STOP_SECONDS = 10.0  # that a batch under way gets to end once it was cancelled


class PolicySampler(ABC):
    """Samples responses from the policy, with its weights as of the last :meth:`refresh`."""

    @abstractmethod
    def refresh(self) -> None:
        """Load the policy's current weights."""

    @abstractmethod
    def respond(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> Rows:
        """Return ``num_samples`` responses to each request, in order."""

    @abstractmethod
    def close(self) -> None:
        """Free the sampler's own resources; the policy is left untouched."""


class OverlappingSampler(PolicySampler):
    """A sampler with weights of its own, which can sample a batch in a thread while the policy is trained.

    Between :meth:`start` and :meth:`finish` nothing else may be asked of it. Collective operations are left to the thread that
    calls these two, because those of two threads would meet in another order in every process.
    """

    def __init__(self) -> None:
        self._under_way: Background[Rows] | None = None

    @abstractmethod
    def start(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> None:
        """Begin to sample, from the weights of the last :meth:`refresh`. Every process must call it."""

    @abstractmethod
    def finish(self) -> Rows | None:
        """Wait for the batch under way and return it; None if its weights were lost meanwhile. Every process must call it.

        Whatever was raised while it was sampled is raised here.
        """

    def _start(self, work: Callable[[], Rows]) -> None:
        self._check_idle()
        self._under_way = Background(work, "sampling")

    def _finish(self) -> Rows:
        if self._under_way is None:
            raise RuntimeError("no batch is under way")
        rows = self._under_way.result()
        self._under_way = None
        return rows

    def forget(self) -> None:
        """Wait for the batch under way, if there is one, and forget it, whatever came of it."""
        if self._under_way is not None:
            self._under_way.wait()
        self._under_way = None

    def _check_idle(self) -> None:
        """Check that the weights are not replaced, and no batch begun, in the middle of a batch."""
        if self._under_way is not None:
            raise RuntimeError("a batch is under way: finish it first")

    def _abandon(self) -> None:
        """Wait a little for the thread of a batch that was cancelled."""
        if self._under_way is not None:
            self._under_way.wait(_STOP_SECONDS)
