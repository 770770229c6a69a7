"""Generation with an OpenAI-compatible server that is already running: one request per response."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.served_models import Card, is_another, listed, matching_card, read_cards
from spin.alignment.core.server_link import RetryPolicy, ServerLink, TryAgain
from spin.alignment.generation.base import GenerationBackend, PromptRequest, Response, SamplingConfig
from spin.alignment.generation.openai.sampled_ids import RIGHT_SERVER, Answer, SampledIds
from spin.alignment.generation.openai.text_ids import TextIds

if TYPE_CHECKING:
    from spin.alignment.generation.base import BackendSettings

DEFAULT_BATCH_SIZE = 64
# Short, because there is no point in waiting for a server that was never started.
FIRST_CONTACT = RetryPolicy(attempts=3, timeout=30.0)


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
        self.policy = policy or RetryPolicy()
        self.batch_size = settings.batch_size or DEFAULT_BATCH_SIZE
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        self.link = ServerLink(settings.base_url, self.batch_size, key)
        try:
            model_name = find_model(read_cards(self.link, first_contact, RIGHT_SERVER), settings, str(self.link.url))
            self.protocol: SampledIds | TextIds = (
                SampledIds(settings, self.link, model_name)
                if settings.token_ids == "sampled"
                else TextIds(settings, self.link, model_name, self.policy)
            )
        except BaseException:
            self.link.close()
            raise

    def use_model(self, name: str) -> None:
        """Ask from now on for the model that the server serves under a name."""
        self.protocol.model_name = name

    def stream(
        self, requests: Iterable[PromptRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        """See :meth:`GenerationBackend.stream`; keeps at most ``batch_size`` requests in flight."""
        waiting = ((n, request, sample) for n, request in enumerate(requests) for sample in range(sampling.num_samples))
        in_flight: dict[Future[Answer], tuple[int, PromptRequest, int]] = {}
        # Filled by callbacks in the thread of the event loop, read here.
        landed: SimpleQueue[Future[Answer]] = SimpleQueue()
        rows: dict[int, dict[int, Response]] = {}

        def fill() -> None:
            for n, request, sample in islice(waiting, self.batch_size - len(in_flight)):
                self.protocol.prepare(request, sampling)
                future = self.link.start(self._ask(request, self.protocol.body(request, sample, sampling)))
                in_flight[future] = (n, request, sample)
                future.add_done_callback(landed.put)

        try:
            fill()
            while in_flight:
                future = landed.get()
                n, request, sample = in_flight.pop(future)
                row = rows.setdefault(n, {})
                row[sample] = self.protocol.response(future.result(), request, sampling)
                # New requests are sent before the result is yielded, because the caller may take a while with it.
                fill()
                if len(row) == sampling.num_samples:
                    del rows[n]
                    yield n, [row[sample] for sample in sorted(row)]
        finally:
            for future in in_flight:
                future.cancel()

    async def _ask(self, request: PromptRequest, body: dict[str, Any]) -> Answer:
        """Return an answer with one choice; the choice is checked later, in the caller's thread."""
        purpose = f"prompt {request.prompt_id}"
        answer: Answer = await self.link.send(
            "/completions", purpose, self.policy, body, body["max_tokens"], _check_aborted
        )
        if _only_choice(answer) is None:
            raise InputError(f"the answer of {self.link.url} to {purpose} contains no completion: {RIGHT_SERVER}")
        return answer

    def close(self) -> None:
        """Cancel requests in flight and close the connections; the server keeps running."""
        self.protocol.close()
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
            f"the server at {url} serves {listed(models)}, not {settings.model}: start one that lists it as {name}, such as "
            f"`vllm serve {settings.model} --served-model-name {name} --generation-config vllm`"
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
