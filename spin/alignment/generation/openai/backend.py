"""Generation with an OpenAI-compatible server that is already running: token ids in, token ids out, one request per response."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.served_models import Card, is_another, listed, matching_card, read_cards
from spin.alignment.core.server_link import RetryPolicy, ServerLink, TryAgain
from spin.alignment.generation.base import (
    GenerationBackend,
    PromptRequest,
    Response,
    SamplingConfig,
    check_sampled,
    logit_bias,
    sample_seed,
)

if TYPE_CHECKING:
    from spin.alignment.generation.base import BackendSettings

DEFAULT_BATCH_SIZE = 64
# Short, because there is no point in waiting for a server that was never started.
FIRST_CONTACT = RetryPolicy(attempts=3, timeout=30.0)
RIGHT_SERVER = (
    "this backend needs a server that takes and returns token ids (vLLM 0.10.2 or newer: `vllm serve MODEL "
    "--generation-config vllm`), because responses are never re-tokenized from text"
)


class OpenAIBackend(GenerationBackend):
    """A client of one server; it does not load a model."""

    def __init__(
        self, settings: BackendSettings, policy: RetryPolicy | None = None, first_contact: RetryPolicy = FIRST_CONTACT
    ) -> None:
        """Ask the server which models it serves.

        Raises:
            InputError: the server cannot be reached, or serves another model or too short a context.
        """
        _check_settings(settings)
        self.settings = settings
        self._masked = frozenset(settings.masked_ids)
        self._bias = {str(token): bias for token, bias in logit_bias(settings.masked_ids).items()}
        self.policy = policy or RetryPolicy()
        self.batch_size = settings.batch_size or DEFAULT_BATCH_SIZE
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        self.link = ServerLink(settings.base_url, self.batch_size, key)
        try:
            self.model_name = find_model(read_cards(self.link, first_contact, RIGHT_SERVER), settings, str(self.link.url))
        except BaseException:
            self.link.close()
            raise

    def stream(
        self, requests: Iterable[PromptRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        """See :meth:`GenerationBackend.stream`; keeps at most ``batch_size`` requests in flight."""
        waiting = ((n, request, sample) for n, request in enumerate(requests) for sample in range(sampling.num_samples))
        in_flight: dict[Future[Card], tuple[int, PromptRequest, int]] = {}
        # Filled by callbacks in the thread of the event loop, read here.
        landed: SimpleQueue[Future[Card]] = SimpleQueue()
        rows: dict[int, dict[int, Response]] = {}

        def fill() -> None:
            for n, request, sample in islice(waiting, self.batch_size - len(in_flight)):
                future = self.link.start(self._ask(request, self._body(request, sample, sampling)))
                in_flight[future] = (n, request, sample)
                future.add_done_callback(landed.put)

        try:
            fill()
            while in_flight:
                future = landed.get()
                n, request, sample = in_flight.pop(future)
                row = rows.setdefault(n, {})
                row[sample] = self._response(future.result(), request, sampling)
                # New requests are sent before the result is yielded, because the caller may take a while with it.
                fill()
                if len(row) == sampling.num_samples:
                    del rows[n]
                    yield n, [row[sample] for sample in sorted(row)]
        finally:
            for future in in_flight:
                future.cancel()

    def _body(self, request: PromptRequest, sample: int, sampling: SamplingConfig) -> dict[str, Any]:
        """The body of one request. Every setting is explicit, so that no default of the server affects sampling."""
        return {
            "model": self.model_name,
            "prompt": [int(token) for token in request.token_ids],
            "n": 1,
            "stream": False,
            "max_tokens": sampling.longest(request),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": sample_seed(sampling.seed, request.prompt_id, sample),
            # Only these ids end a response: the EOS in the model's configuration must not be added.
            "stop_token_ids": list(self.settings.stop_ids),
            "ignore_eos": True,
            "stop": list(sampling.stop),
            # Stop texts are matched against text with the markers of its parts, as this project decodes it.
            "skip_special_tokens": False,
            "return_token_ids": True,
            **({"logit_bias": self._bias} if self._bias else {}),
            # 0: the log-prob of the sampled token and of no other.
            **({"logprobs": 0} if sampling.logprobs else {}),
        }

    async def _ask(self, request: PromptRequest, body: dict[str, Any]) -> Card:
        """Return the only choice of the answer; it is checked later, in the caller's thread."""
        purpose = f"prompt {request.prompt_id}"
        answer = await self.link.send("/completions", purpose, self.policy, body, body["max_tokens"], _check_aborted)
        choice = _only_choice(answer)
        if choice is None:
            raise InputError(f"the answer of {self.link.url} to {purpose} contains no completion: {RIGHT_SERVER}")
        return choice

    def _response(self, choice: Card, request: PromptRequest, sampling: SamplingConfig) -> Response:
        """Return the sampled response; raise :class:`InputError` unless the server did exactly as requested."""
        ids, server, prompt = choice.get("token_ids"), f"the server at {self.link.url}", f"prompt {request.prompt_id}"
        if not isinstance(ids, list):
            raise InputError(f"{server} returned text but no token ids: {RIGHT_SERVER}")
        if choice.get("prompt_token_ids") not in (None, list(request.token_ids)):
            raise InputError(f"{server} changed the token ids of {prompt} before it answered: {RIGHT_SERVER}")
        check_sampled(ids, self._masked, server)
        logprobs = self._logprobs(choice, ids, prompt) if sampling.logprobs else None
        reason, limit = choice.get("finish_reason"), sampling.longest(request)
        if reason not in ("stop", "length"):
            raise InputError(f"{server} did not finish {prompt}: the finish reason is {reason!r}, not stop or length")
        if ids and ids[-1] in self.settings.stop_ids:
            return Response(ids, "stop", logprobs)
        # vLLM reports the stop text that ended a response as its stop_reason.
        if ids and reason == "stop" and sampling.stop and choice.get("stop_reason") in sampling.stop:
            length = _completing_length(ids, sampling.stop, self.settings.decode)
            return Response(ids[:length], "stop", logprobs[:length] if logprobs else None)
        if reason == "length" and len(ids) == limit:
            return Response(ids, "length", logprobs)
        last = f", the last is {ids[-1]}" if ids else ""
        raise InputError(
            f"{server} ended {prompt} ({reason}) after {len(ids)} of {limit} tokens{last}, without a requested reason: "
            "start it with --generation-config vllm and without limits of its own"
        )

    def _logprobs(self, choice: Card, ids: list[int], prompt: str) -> list[float]:
        values = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(values, list) or len(values) != len(ids) or None in values:
            raise InputError(
                f"the server at {self.link.url} did not return a log-prob for each token of {prompt}: remove --logprobs, or "
                "use a server that supports them (vLLM)"
            )
        return [float(value) for value in values]

    def close(self) -> None:
        """Cancel requests in flight and close the connections; the server keeps running."""
        self.link.close()


def _check_settings(settings: BackendSettings) -> None:
    """Refuse settings that can only be chosen when the server is started."""
    if settings.dtype != "auto":
        raise InputError(
            f"dtype is {settings.dtype}, but the precision of a running server is fixed: leave dtype at auto and start the "
            f"server with --dtype {settings.dtype}"
        )
    if settings.batch_invariant:
        raise InputError("batch_invariant is for vllm: remove it and start the server with VLLM_BATCH_INVARIANT=1")
    if settings.tensor_parallel_size != 1:
        raise InputError("tensor_parallel_size belongs to the command that starts the server: leave it at 1 here")


def _only_choice(answer: Any) -> Card | None:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return choices[0] if isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict) else None


def _check_aborted(answer: Any) -> None:
    """Retry if a server that is shutting down aborted the request, which vLLM reports with status 200."""
    choice = _only_choice(answer)
    if choice is not None and choice.get("finish_reason") == "abort":
        raise TryAgain("it aborted the request")


def _completing_length(ids: Sequence[int], stop: Sequence[str], decode: Callable[[Sequence[int]], str] | None) -> int:
    """Return the number of ids up to and including the one that completes a stop text.

    A server that samples several tokens per step (speculative decoding) may return some that follow it.
    """
    length = len(ids)
    while decode is not None and length > 1:
        text = decode(ids[: length - 1])
        if not any(end in text for end in stop):
            break
        length -= 1
    return length


def find_model(cards: Sequence[Card], settings: BackendSettings, url: str) -> str:
    """Return the name under which the server serves the model, or the adapter on top of it.

    A model is recognised by its id, by the folder it was loaded from, or by the name of the folder, as it may be mounted at
    another path there.

    Raises:
        InputError: the server serves something else, or too short a context.
    """
    models = [card for card in cards if not card.get("parent")]
    card = matching_card(models, settings.model)
    if card is None:
        name = Path(settings.model).resolve().name
        raise InputError(
            f"the server at {url} serves {listed(models)}, not {settings.model}: start one with `vllm serve "
            f"{settings.model} --served-model-name {name} --generation-config vllm`"
        )
    context, needed = card.get("max_model_len"), settings.max_model_len
    if context is not None and needed is not None and context < needed:
        raise InputError(
            f"the server at {url} accepts at most {context} tokens, but a prompt and its response may take {needed}: start it "
            f"with --max-model-len {needed}, or set a lower max_prompt_length or max_new_tokens"
        )
    if settings.adapter is None:
        return str(card["id"])
    adapter = Path(settings.adapter).resolve()
    for other in cards:
        if other["id"] == adapter.name and other is not card and not is_another(other, settings.adapter):
            return adapter.name
    raise InputError(
        f"the server at {url} serves {listed(cards)}, but no adapter {settings.adapter}: start it with --enable-lora "
        f"--lora-modules {adapter.name}={adapter}"
    )


__all__ = ["OpenAIBackend", "RetryPolicy", "find_model"]
