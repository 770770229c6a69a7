"""The interface of generation backends: token ids in, token ids out, one sampling specification."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from spin.alignment.core.errors import InputError
from spin.alignment.core.settings import check_settings, setting
from spin.alignment.models.config import Dtype

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder

FinishReason = Literal["stop", "length"]
TokenIds = Literal["sampled", "from_text"]


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled, with the same meaning in every backend."""

    num_samples: int = setting(1, "responses per prompt", ge=1, le=100_000)
    temperature: float = setting(1.0, "divides the logits; 0 is greedy", ge=0)
    top_p: float = setting(
        1.0, "nucleus sampling: the most likely tokens with this total probability; 1 is off", gt=0, le=1
    )
    top_k: int = setting(0, "this many most likely tokens; 0 is off", ge=0)
    min_p: float = setting(0.0, "minimum probability relative to the most likely token; 0 is off", ge=0, lt=1)
    repetition_penalty: float = setting(
        1.0,
        "divides positive and multiplies negative logits of tokens that occur in prompt or response; 1 is off",
        gt=0,
    )
    max_new_tokens: int = setting(
        1024,
        "maximum tokens of a response, including the end-of-turn token; 0: as many as fit in the context after each prompt",
        ge=0,
    )
    stop: tuple[str, ...] = setting((), "texts that end a response; they are kept in the ids and removed from the text")
    logprobs: bool = setting(
        False, "store the model's own log-prob (nats, temperature 1, no truncation) of every sampled token"
    )
    seed: int = setting(42, "seed of the responses", ge=0)

    def __post_init__(self) -> None:
        check_settings(self)
        if any(not text for text in self.stop):
            raise InputError("stop contains an empty text, which would end every response immediately: remove it")
        # Identical samples would waste the computation and give identical pairs.
        if self.temperature == 0.0 and self.num_samples > 1:
            raise InputError(
                "temperature 0 draws the same response every time: set num_samples to 1 or raise temperature"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self) | {"stop": list(self.stop)}

    def longest(self, request: PromptRequest) -> int:
        """Return the maximum number of tokens of a response to this request.

        Raises:
            ValueError: neither ``max_new_tokens`` nor the request sets a limit.
        """
        limits = [limit for limit in (self.max_new_tokens, request.free_tokens) if limit]
        if not limits:
            raise ValueError(f"nothing limits the response to prompt {request.prompt_id}: set max_new_tokens")
        return min(limits)


@dataclass(frozen=True)
class PromptRequest:
    """One prompt: its id and its token ids, with at most one BOS and including the generation prompt.

    ``free_tokens`` is the number of tokens that fit in the model's context after the prompt, None without a limit.
    """

    prompt_id: str
    token_ids: Sequence[int]
    free_tokens: int | None = None


@dataclass(frozen=True)
class Response:
    """The sampled ids, without the prompt.

    ``finish_reason`` is ``stop`` if and only if the last id is an end-of-turn id or completes a stop text. ``logprobs``
    contains one number (nats) per id if requested. ``weights_version`` names the weights that a server had which gets new ones.
    """

    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float] | None = None
    weights_version: str | None = None


class GenerationBackend(ABC):
    """Generates responses to prompts; owns the model until it is closed."""

    @abstractmethod
    def stream(
        self, requests: Iterable[PromptRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        """Yield ``(n, responses)`` for the n-th request as soon as all of its ``num_samples`` responses are finished.

        Requests are taken from the iterable only when there is capacity for them, so the caller decides late what comes next;
        once it is exhausted, requests in flight are finished. Closing the iterator cancels them.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the model and the device memory."""

    def generate(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> list[list[Response]]:
        """Return ``num_samples`` responses for each request, in the order of the requests."""
        responses = dict(self.stream(requests, sampling))
        return [responses[index] for index in range(len(requests))]


def sample_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """Return the 63-bit seed of one response, which depends only on (seed, prompt id, sample index)."""
    # NUL separates the parts, so that (1, "2") and (12, "") differ.
    digest = hashlib.sha256(f"{seed}\x00{prompt_id}\x00{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits fit a signed 64-bit integer, which vLLM requires


# vLLM clamps a bias to -100, which makes a token less likely by e**100, and its engine takes at most this many per request.
MOST_BIASES, BIAS = 1024, -100.0


def logit_bias(masked_ids: Sequence[int]) -> dict[int, float]:
    """Return the biases that keep an engine from sampling ids without a token; see :func:`check_sampled`."""
    return dict.fromkeys(masked_ids[:MOST_BIASES], BIAS)


def check_sampled(ids: Sequence[int], masked_ids: frozenset[int], engine: str) -> None:
    """Refuse a response with an id that has no token.

    Raises:
        InputError: the id is named.
    """
    if not masked_ids.isdisjoint(ids):
        token = next(token for token in ids if token in masked_ids)
        raise InputError(
            f"{engine} sampled token id {token}, for which the tokenizer has no token: train the model further, or use "
            "--backend transformers, which never samples such ids"
        )


@dataclass(frozen=True)
class BackendSettings:
    """What a backend needs to load a model.

    Attributes:
        max_model_len: maximum length of prompt plus response, in tokens.
        stop_ids: ids that end a response.
        masked_ids: ids of the model that its tokenizer has no token for; they are never sampled.
        decode: sampled ids -> text, in which stop texts are searched for.
        encoder: the model's :class:`ChatEncoder`, for servers that return no token ids.
        adapter_rank: rank of the LoRA adapters that are loaded while it runs; 0: none.
        beside_training: an engine on the GPUs of ``tensor_parallel_size`` training processes, of which this is the first; it
            gives their memory back after each batch of responses, until it gets new weights.
        keeps_memory: it does not, because it also generates while the policy is trained.
    """

    model: str
    revision: str | None = None
    adapter: str | None = None
    dtype: Dtype = "auto"
    batch_size: int | None = setting(None, "responses in flight at once", unset="the backend's own", ge=1)
    tensor_parallel_size: int = setting(1, "GPUs of one engine (vllm)", ge=1)
    max_model_len: int | None = None
    gpu_memory_utilization: float = setting(0.9, "share of GPU memory that the engine takes (vllm)", gt=0, le=1)
    trust_remote_code: bool = False
    stop_ids: list[int] = field(default_factory=list)
    masked_ids: tuple[int, ...] = ()
    pad_id: int = 0
    decode: Callable[[Sequence[int]], str] | None = None
    adapter_rank: int = 0
    beside_training: bool = False
    keeps_memory: bool = False
    batch_invariant: bool = setting(False, "the same responses in any batch (vllm, H100 or newer; slower)")
    base_url: str | None = setting(
        None, "address of a running OpenAI-compatible server, such as http://host:8000/v1 (openai)"
    )
    token_ids: TokenIds = setting(
        "sampled",
        "where the ids of responses come from (openai): sampled: the server returns those that it sampled; from_text: the "
        "model's tokenizer encodes the text that it returns",
    )
    encoder: ChatEncoder | None = None


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
            weights are replaced (the backend has the methods ``load(weights)``, ``reload(folder)``, ``load_adapter(folder)``,
            ``sleep()`` and ``cancel()``), by a ``server`` whose weights are replaced, or not at all. Engines and servers can also
            sample while the policy is trained.
        adapter_obstacle: why an engine cannot apply a LoRA adapter of a rank to a model with a configuration; None if it can.
        makes_processes: it starts processes of its own, for which it wants to be the first to configure torch.
        check_installed: raises :class:`InputError` where what it needs is not installed.
    """

    make: Callable[[BackendSettings], GenerationBackend]
    takes: frozenset[str] = frozenset()
    needs_server: bool = False
    flush_every: int = 512
    holds_batch: bool = False
    online: Literal["", "own_module", "engine", "server"] = ""
    makes_processes: bool = False
    check_installed: Callable[[], None] = lambda: None
    adapter_obstacle: Callable[[Any, int], str | None] = lambda config, rank: None

    def __call__(self, settings: BackendSettings) -> GenerationBackend:
        return self.make(settings)


# Settings that only some backends take, with the value that asks for nothing.
ENGINE_SETTINGS: dict[str, Any] = {"tensor_parallel_size": 1, "batch_invariant": False, "gpu_memory_utilization": 0.9}
BACKEND_SETTINGS: dict[str, Any] = ENGINE_SETTINGS | {"token_ids": "sampled"}
