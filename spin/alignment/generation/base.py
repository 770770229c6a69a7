"""What every generation backend receives and returns: token ids in, token ids out, one sampling specification."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from spin.alignment.errors import InputError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn; the same meaning in every backend. ``temperature`` 0 is greedy, ``top_k`` 0 is off."""

    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    seed: int = 42

    def __post_init__(self) -> None:
        for name, valid, range_ in (
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not valid:
                raise InputError(f"{name} is {getattr(self, name)}: set it to a value {range_}")
        if self.temperature == 0.0 and self.num_samples > 1:
            raise InputError(
                "temperature 0 draws the same response every time: set num_samples to 1 or raise temperature"
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PromptRequest:
    """One prompt: its id and its token ids, at most one BOS, generation prompt included."""

    prompt_id: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Response:
    """The sampled ids, prompt excluded; the end-of-turn id comes last exactly when ``finish_reason`` is ``stop``."""

    token_ids: list[int]
    finish_reason: FinishReason


class GenerationBackend(Protocol):
    """Turns prompts into responses; owns the model for as long as it lives."""

    def generate(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> list[list[Response]]:
        """Return ``num_samples`` responses for each request, in the order of the requests."""

    def close(self) -> None:
        """Free the model and the device memory."""


def sample_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """Return the 63-bit seed of one response: it depends on nothing but (seed, prompt id, sample index)."""
    digest = hashlib.sha256(f"{seed}\x00{prompt_id}\x00{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
