"""Requests to servers that take and return token ids: what was sampled is what is stored, id by id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.server_link import ServerLink
from spin.alignment.generation.base import (
    BackendSettings,
    PromptRequest,
    Response,
    SamplingConfig,
    check_sampled,
    logit_bias,
    sample_seed,
)

Answer = dict[str, Any]
RIGHT_SERVER = (
    "this backend needs a server that takes and returns token ids (vLLM 0.10.2 or newer: `vllm serve MODEL "
    "--generation-config vllm`), or token_ids: from_text, which encodes the returned text again"
)


class SampledIds:
    """Prompts are sent and responses returned as token ids."""

    def __init__(self, settings: BackendSettings, link: ServerLink, model_name: str) -> None:
        self.settings, self.model_name = settings, model_name
        self.server = f"the server at {link.url}"
        self._masked = frozenset(settings.masked_ids)
        self._bias = {str(token): bias for token, bias in logit_bias(settings.masked_ids).items()}

    def prepare(self, request: PromptRequest, sampling: SamplingConfig) -> None:
        """Do nothing: every answer says itself whether the server is suitable."""

    def body(self, request: PromptRequest, sample: int, sampling: SamplingConfig) -> dict[str, Any]:
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

    def response(self, answer: Answer, request: PromptRequest, sampling: SamplingConfig) -> Response:
        """Return the sampled response; raise :class:`InputError` unless the server did exactly as requested."""
        choice, server, prompt = answer["choices"][0], self.server, f"prompt {request.prompt_id}"
        ids = choice.get("token_ids")
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

    def _logprobs(self, choice: Answer, ids: list[int], prompt: str) -> list[float]:
        values = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(values, list) or len(values) != len(ids) or None in values:
            raise InputError(
                f"{self.server} did not return a log-prob for each token of {prompt}: remove --logprobs, or "
                "use a server that supports them (vLLM)"
            )
        return [float(value) for value in values]

    def close(self) -> None:
        """Do nothing."""


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
