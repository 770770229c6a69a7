"""The interface of what online training samples with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from spin.alignment.generation.base import PromptRequest, Response, SamplingConfig


class PolicySampler(ABC):
    """Samples responses from the policy, with its weights as of the last :meth:`refresh`."""

    @abstractmethod
    def refresh(self) -> None:
        """Load the policy's current weights."""

    @abstractmethod
    def respond(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> list[list[Response]]:
        """Return ``num_samples`` responses to each request, in order."""

    @abstractmethod
    def close(self) -> None:
        """Free the sampler's own resources; the policy is left untouched."""
