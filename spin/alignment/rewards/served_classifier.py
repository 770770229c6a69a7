"""A sequence classifier that a running vLLM server computes: token ids out, logits back (``POST /classify``)."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.models.folder import read_config_file
from spin.alignment.rewards.classifier import Encoded, SequenceClassifier, check_classifier_config

if TYPE_CHECKING:
    from spin.alignment.core.server_link import RetryPolicy
    from spin.alignment.rewards.base import ScorerSettings

RIGHT_SERVER = "start one with `vllm serve MODEL --runner pooling`, for a model with one output"


def make_classifier(settings: ScorerSettings) -> SequenceClassifier:
    """Return the classifier of a reward or preference model: the server's if there is a ``base_url``, else one of this process.

    Raises:
        InputError: the model cannot be used, or the server does not serve it.
    """
    return SequenceClassifier(settings) if settings.base_url is None else ServedClassifier(settings)


class ServedClassifier(SequenceClassifier):
    """Encodes texts with the tokenizer in the model's folder, and leaves the forward passes to the server."""

    def __init__(self, settings: ScorerSettings, policy: RetryPolicy | None = None) -> None:
        """Check the tokenizer and ask the server which models it serves.

        Raises:
            InputError: no tokenizer, the server cannot be reached, or it serves another model.
        """
        from spin.alignment.core.server_link import RetryPolicy, ServerLink

        self.policy = policy or RetryPolicy()
        # vLLM's own endpoints are not below /v1, the address that the other backends and most users write.
        root = str(settings.base_url).rstrip("/").removesuffix("/v1")
        self.link = ServerLink(root, settings.batch_size, os.environ.get("OPENAI_API_KEY", "").strip())
        try:
            # Fewer retries than for inputs: there is no point in waiting for a server that was never started.
            self.name = self._find_model(settings, policy or RetryPolicy(attempts=3, timeout=30.0))
            super().__init__(settings)
        except BaseException:
            self.link.close()
            raise

    def _find_model(self, settings: ScorerSettings, policy: RetryPolicy) -> str:
        from spin.alignment.core.served_models import listed, matching_card, read_cards

        assert settings.model is not None
        cards = read_cards(self.link, policy, RIGHT_SERVER, "/v1/models")
        card = matching_card(cards, settings.model)
        if card is None:
            raise InputError(
                f"the server at {self.link.url} serves {listed(cards)}, not {settings.model}: {RIGHT_SERVER}"
            )
        return str(card["id"])

    def _check(self) -> dict[str, Any]:
        return check_served_folder(self.folder, self.settings)

    def _identity(self) -> tuple[object, ...]:
        return ("served", str(self.link.url), self.name)

    def _values(self, batches: Sequence[Sequence[Encoded]]) -> Generator[list[float]]:
        items = [item for batch in batches for item in batch]
        found: dict[str, float] = {}
        answers = self.link.answers(items, self._ask, self.settings.batch_size)
        for batch in batches:
            while any(item.key not in found for item in batch):
                item, answer = next(answers)
                found[item.key] = self._logit(answer, item.where)
            yield [found.pop(item.key) for item in batch]

    async def _ask(self, item: Encoded) -> Any:
        if item.types is not None and any(item.types):
            raise InputError(
                f"{self.folder} reads token types, which a server cannot be given: leave base_url out, or use a model with a "
                "chat template"
            )
        # The raw output: the default of the server is a probability.
        body = {"model": self.name, "input": list(item.ids), "use_activation": False}
        return await self.link.send("/classify", item.where, self.policy, body)

    def _logit(self, answer: Any, where: str) -> float:
        try:
            (data,) = answer["data"]
            values = [float(value) for value in data["probs"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the answer of {self.link.url} to {where} has no class values: {RIGHT_SERVER}") from error
        if len(values) != 1:
            raise InputError(
                f"the model at {self.link.url} has {len(values)} outputs, but a {self.settings.name.replace('_', ' ')} has one: "
                f"{RIGHT_SERVER}"
            )
        return values[0]

    def close(self) -> None:
        """Close the connections; the server keeps running. May be called twice."""
        super().close()
        self.link.close()


def check_served_folder(folder: Path, settings: ScorerSettings) -> dict[str, Any]:
    """Return the configuration in the folder of a served model, which needs no weights there.

    Raises:
        InputError: it is not a sequence classifier with one output, or a setting belongs to the server.
    """
    if settings.dtype != "auto":
        raise InputError(
            f"scorer_dtype is {settings.dtype}, but the precision of a running server is fixed: leave it at auto and start the "
            f"server with --dtype {settings.dtype}"
        )
    return check_classifier_config(read_config_file(folder), folder, settings.name.replace("_", " "))
