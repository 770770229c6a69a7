"""Requests to servers that return text only (SGLang, llama.cpp, hosted ones): it is encoded once, with the model's tokenizer.

The ids are then not certain to be those that were sampled, so this has to be asked for (``token_ids: from_text``), is stated on
the console, and is recorded in the provenance of the rows. Two things can be checked by the numbers of tokens that the server
counts: that it reads a prompt as it was encoded here, and for how many responses the ids cannot be the sampled ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.server_link import Refused, RetryPolicy, ServerLink
from spin.alignment.data.chat_encoder import RowRefused
from spin.alignment.generation.base import (
    BackendSettings,
    PromptRequest,
    Response,
    SamplingConfig,
    logit_bias,
    sample_seed,
)
from spin.alignment.generation.openai.sampled_ids import Answer

_MOST_STOPS = 4  # stop texts in a request, by the OpenAI API


class _ReadOtherwise(InputError):
    """The server did not read a prompt as it is encoded here, or does not tell."""


class TextIds:
    """Prompts are sent in the first of three forms that the server reads as they were encoded here; responses return as text."""

    def __init__(self, settings: BackendSettings, link: ServerLink, model_name: str, policy: RetryPolicy) -> None:
        """State on the console where the ids of the responses come from."""
        assert settings.encoder is not None, "token ids from text need the model's encoder"
        self.settings, self.link, self.model_name, self.policy = settings, link, model_name, policy
        self.server, self.encoder = f"the server at {link.url}", settings.encoder
        self._bias = {str(token): bias for token, bias in logit_bias(settings.masked_ids).items()}
        ends = (self.encoder.tokenizer.decode([token]) for token in settings.stop_ids)
        self._ends = [text for text in ends if text.strip()][:_MOST_STOPS]
        self._form: Callable[[PromptRequest], Any] | None = None
        self._responses = self._other_length = 0
        say_error(
            f"token_ids is from_text: {self.server} returns text, which is encoded with the tokenizer of {self.encoder.name}; "
            "the ids can differ from the sampled ones (recorded in the provenance)"
        )

    def prepare(self, request: PromptRequest, sampling: SamplingConfig) -> None:
        """Find out, with the first prompt, in which form the server reads prompts as they were encoded here.

        Raises:
            InputError: in none of them.
        """
        if self._form is not None:
            return
        found = []
        forms = {"token ids": _as_ids, "text": self._as_text, "text without its BOS": self._as_text_without_bos}
        for name, form in forms.items():
            try:
                self._form = form
                body = self.body(request, 0, sampling) | {"max_tokens": 1}
                purpose = f"prompt {request.prompt_id} as {name}"
                answer = self.link.start(self.link.send("/completions", purpose, self.policy, body, 1)).result()
                self._check_prompt(answer, request)
                return
            except (Refused, _ReadOtherwise, RowRefused) as error:
                found.append(str(error))
        self._form = None
        raise InputError(
            f"{self.server} does not read prompts as they are encoded here ({'; '.join(found)}): serve the model with its own "
            "tokenizer under /v1/completions; an endpoint for chats alone cannot be used, because it has a template of its own"
        )

    def body(self, request: PromptRequest, sample: int, sampling: SamplingConfig) -> dict[str, Any]:
        """Return the body of one request. Settings are off by a value that vLLM, SGLang and llama.cpp understand, so that no
        default of the server affects sampling.

        Raises:
            InputError: the prompt cannot be sent in the server's form.
        """
        assert self._form is not None
        return {
            "model": self.model_name,
            "prompt": self._form(request),
            "add_special_tokens": False,  # vLLM; whether another server adds a BOS is seen by its count of tokens
            "n": 1,
            "stream": False,
            "max_tokens": sampling.longest(request),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "repeat_penalty": sampling.repetition_penalty,  # llama.cpp's name
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": sample_seed(sampling.seed, request.prompt_id, sample) % 2**31,  # llama.cpp reads 32 bits
            "stop": self._ends,
            "skip_special_tokens": False,
            **({"logit_bias": self._bias} if self._bias else {}),
        }

    def response(self, answer: Answer, request: PromptRequest, sampling: SamplingConfig) -> Response:
        """Return the response with the ids of its text, and the end-of-turn id if the server says that it ended.

        Raises:
            InputError: there is no text, the server read another prompt, or it ended for another reason.
        """
        self._check_prompt(answer, request)
        choice, prompt = answer["choices"][0], f"prompt {request.prompt_id}"
        text, reason = choice.get("text"), choice.get("finish_reason")
        if not isinstance(text, str):
            raise InputError(f"{self.server} returned no text for {prompt}: it is no server of completions")
        if reason not in ("stop", "length"):
            raise InputError(
                f"{self.server} did not finish {prompt}: the finish reason is {reason!r}, not stop or length"
            )
        limit = sampling.longest(request)
        ids = self.encoder.continuation_ids(request.token_ids, text)
        ends = [place for place, token in enumerate(ids) if token in self.settings.stop_ids]
        if ends:
            ids = ids[: ends[0] + 1]
        elif reason == "stop":
            ids = [*ids, self.encoder.end_id]
        self._count(answer, ids, reason)
        ended = bool(ids) and ids[-1] in self.settings.stop_ids
        if len(ids) > limit:  # the text takes more tokens here than it did when it was sampled
            ids, ended = ids[:limit], False
        if not ids:
            raise InputError(f"{self.server} returned an empty text for {prompt}, cut off after {limit} tokens")
        return Response(ids, "stop" if ended else "length")

    def _count(self, answer: Answer, ids: list[int], reason: str) -> None:
        """Count responses whose ids cannot be the sampled ones; servers differ in whether they count the end of turn."""
        self._responses += 1
        sampled = _usage(answer, "completion_tokens")
        text_only = len(ids) - (reason == "stop")
        self._other_length += sampled is not None and sampled not in (len(ids), text_only)

    def _check_prompt(self, answer: Any, request: PromptRequest) -> None:
        """Compare the server's count of the prompt's tokens with the ids.

        Raises:
            InputError: it is another, or there is none.
        """
        read, wanted = _usage(answer, "prompt_tokens"), len(request.token_ids)
        if read is None:
            raise _ReadOtherwise(
                f"{self.server} does not say how many tokens of prompt {request.prompt_id} it read (usage.prompt_tokens)"
            )
        if read != wanted:
            raise _ReadOtherwise(f"{self.server} read {read} tokens of prompt {request.prompt_id}, which has {wanted}")

    def _as_text(self, request: PromptRequest) -> str:
        try:
            return self.encoder.prompt_text(request.token_ids)
        except RowRefused as error:
            raise RowRefused(f"prompt {request.prompt_id} cannot be sent as text: {error}") from error

    def _as_text_without_bos(self, request: PromptRequest) -> str:
        bos = self.encoder.tokenizer.bos_token
        return self._as_text(request).removeprefix(bos) if bos else self._as_text(request)

    def close(self) -> None:
        """Say how many responses have ids that cannot be the sampled ones."""
        if self._other_length:
            say_error(
                f"token ids from text: {self._other_length} of {self._responses} responses have another number of tokens than "
                f"{self.server} sampled"
            )
        self._responses = self._other_length = 0


def _as_ids(request: PromptRequest) -> list[int]:
    return [int(token) for token in request.token_ids]


def _usage(answer: Any, name: str) -> int | None:
    """Return a count of tokens in an answer; None if it has none."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) else None
