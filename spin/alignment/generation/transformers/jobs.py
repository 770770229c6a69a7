"""One response being generated: the tokens so far, its own random numbers, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from spin.alignment.generation.base import FinishReason, PromptRequest, Response, SamplingConfig, sample_seed
from spin.alignment.generation.transformers.stop_texts import StopTextWatcher

_NUMBERS_AT_ONCE = 64  # one call of numpy per number would cost more than the number


@dataclass
class Request:
    """The n-th request and those of its responses that are finished."""

    number: int
    prompt: PromptRequest
    limit: int
    responses: list[Response | None] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return all(response is not None for response in self.responses)


class Job:
    """One response of a request.

    Its random numbers are a Philox stream keyed by ``sample_seed``, one per token, so they do not depend on the batch.
    """

    def __init__(
        self,
        request: Request,
        sample: int,
        sampling: SamplingConfig,
        stop_ids: frozenset[int],
        watcher: StopTextWatcher | None,
    ) -> None:
        self.request, self.sample = request, sample
        self.ids: list[int] = []
        self.logprobs: list[float] | None = [] if sampling.logprobs else None
        self._stop_ids, self._watcher = stop_ids, watcher
        seed = sample_seed(sampling.seed, request.prompt.prompt_id, sample)
        self._generator = np.random.Generator(np.random.Philox(key=seed))
        self._numbers: list[float] = []

    @property
    def length(self) -> int:
        """Number of tokens in prompt and response."""
        return len(self.request.prompt.token_ids) + len(self.ids)

    @property
    def reach(self) -> int:
        """Expected length when planning memory: the length plus half of the tokens that may still be added."""
        return self.length + (self.request.limit - len(self.ids) + 1) // 2

    def token_ids(self) -> Sequence[int]:
        """Return the ids of the prompt and of the response so far."""
        prompt = self.request.prompt.token_ids
        return [*prompt, *self.ids] if self.ids else prompt

    def next_number(self) -> float:
        """Return the random number in [0, 1) for the next token."""
        if not self._numbers:  # reversed, because pop() takes from the end
            self._numbers = self._generator.random(_NUMBERS_AT_ONCE).tolist()[::-1]
        return self._numbers.pop()

    def take(self, token: int, logprob: float | None) -> bool:
        """Append a token; return whether it ends the response, which is then stored in the request."""
        self.ids.append(token)
        if self.logprobs is not None and logprob is not None:
            self.logprobs.append(logprob)
        reason: FinishReason
        # A stop at the last allowed token counts as a stop, not as truncation.
        if token in self._stop_ids or (self._watcher is not None and self._watcher.completed(self.ids)):
            reason = "stop"
        elif len(self.ids) == self.request.limit:
            reason = "length"
        else:
            return False
        self.request.responses[self.sample] = Response(self.ids, reason, self.logprobs)
        return True
