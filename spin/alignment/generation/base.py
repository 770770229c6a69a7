"""What every generation backend receives and returns: token ids in, token ids out, one sampling specification."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from spin.alignment.core.errors import InputError
from spin.alignment.models.config import Dtype

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn; the same meaning in every backend.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 is off.
        min_p: keeps the tokens at least this likely relative to the likeliest one; 0 is off.
        repetition_penalty: divides (or multiplies, below 0) the logits of tokens seen in prompt or response; 1 is off.
        max_new_tokens: 0 is what the context leaves behind each prompt.
        stop: texts that end a response where they appear; they stay in the ids and are cut from the text.
        logprobs: return the model's own log-prob (nats, before temperature and cut-offs) of every sampled token.
    """

    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        for name, valid, range_ in (
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0.0 <= self.min_p < 1.0, "in [0, 1)"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "above 0 (1 is off)"),
            ("max_new_tokens", self.max_new_tokens >= 0, "0 (what the context leaves) or more"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not valid:
                raise InputError(f"{name} is {getattr(self, name)}: set it to a value {range_}")
        if any(not text for text in self.stop):
            raise InputError("stop holds an empty text, which would end every response at once: remove it")
        if self.temperature == 0.0 and self.num_samples > 1:
            raise InputError(
                "temperature 0 draws the same response every time: set num_samples to 1 or raise temperature"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self) | {"stop": list(self.stop)}

    def longest(self, request: PromptRequest) -> int:
        """Return the most tokens a response to this request may have.

        Raises:
            ValueError: neither ``max_new_tokens`` nor the request sets a limit.
        """
        limits = [limit for limit in (self.max_new_tokens, request.room) if limit]
        if not limits:
            raise ValueError(f"nothing limits the response to prompt {request.prompt_id}: set max_new_tokens")
        return min(limits)


@dataclass(frozen=True)
class PromptRequest:
    """One prompt: its id and its token ids, at most one BOS, generation prompt included.

    ``room`` is the number of tokens the model's context leaves behind the prompt, None where it sets no limit.
    """

    prompt_id: str
    token_ids: Sequence[int]
    room: int | None = None


@dataclass(frozen=True)
class Response:
    """The sampled ids, prompt excluded.

    ``finish_reason`` is ``stop`` exactly when the last id is an end-of-turn id or completes a stop text. ``logprobs`` holds
    one number (nats) for each id when the sampling asks for them.
    """

    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float] | None = None


class GenerationBackend(ABC):
    """Turns prompts into responses; owns the model for as long as it lives."""

    @abstractmethod
    def stream(
        self, requests: Iterable[PromptRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        """Yield ``(n, responses)`` for the n-th request as soon as the last of its ``num_samples`` responses is there.

        Requests are drawn from the iterable only as room for them becomes free, so the caller decides late what comes next;
        when it ends, those in flight are finished. Closing the iterator gives up what is in flight.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the model and the device memory."""

    def generate(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> list[list[Response]]:
        """Return ``num_samples`` responses for each request, in the order of the requests."""
        responses = dict(self.stream(requests, sampling))
        return [responses[index] for index in range(len(requests))]


def sample_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """Return the 63-bit seed of one response: it depends on nothing but (seed, prompt id, sample index)."""
    digest = hashlib.sha256(f"{seed}\x00{prompt_id}\x00{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class BackendSettings:
    """What a backend needs to load a model.

    Attributes:
        adapter: folder of LoRA adapters to serve on top of the model.
        dtype: auto (that of the checkpoint), float32, bfloat16 or float16.
        batch_size: responses in flight; None leaves it to the backend.
        max_model_len: the longest prompt plus response, in tokens.
        stop_ids: the ids that end a response.
        decode: sampled ids -> text; stop texts are looked for in it.
        batch_invariant: let the engine compute every response the same in any batch (vllm on an H100 or newer; slower).
        base_url: address of an OpenAI-compatible server (openai).
    """

    model: str
    revision: str | None = None
    adapter: str | None = None
    dtype: Dtype = "auto"
    batch_size: int | None = None
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    trust_remote_code: bool = False
    stop_ids: list[int] = field(default_factory=list)
    pad_id: int = 0
    decode: Callable[[Sequence[int]], str] | None = None
    batch_invariant: bool = False
    base_url: str | None = None


@dataclass(frozen=True)
class Backend:
    """A backend as the registry knows it: how it is made and what it can do, said before anything heavy is imported.

    A plain callable is a backend too, with the defaults below.

    Attributes:
        make: imports and loads it.
        takes: settings that mean something to it and not to every backend (``BACKEND_SETTINGS`` are those).
        needs_server: it asks a running server at ``base_url``, so the model folder need not have weights.
        flush_every: finished prompts in a part of a fraction, unless the user says otherwise.
        holds_batch: it decodes ``batch_size`` responses at a time in this process; others plan their batches themselves.
        online: how online training draws from the policy with it: by the policy's ``own_module``, by an ``engine`` whose
            weights are reloaded (the backend has a method ``reload(folder)``), or not at all.
        check_installed: raises :class:`InputError` where what it needs is not installed.
    """

    make: Callable[[BackendSettings], GenerationBackend]
    takes: frozenset[str] = frozenset()
    needs_server: bool = False
    flush_every: int = 512
    holds_batch: bool = False
    online: Literal["", "own_module", "engine"] = ""
    check_installed: Callable[[], None] = lambda: None

    def __call__(self, settings: BackendSettings) -> GenerationBackend:
        return self.make(settings)


# Settings that only some backends take, with the value that asks for nothing.
BACKEND_SETTINGS: dict[str, Any] = {"tensor_parallel_size": 1, "batch_invariant": False, "gpu_memory_utilization": 0.9}
