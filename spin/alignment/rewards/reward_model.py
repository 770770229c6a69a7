"""A reward model: a sequence classifier with one output that scores the last turn of a conversation."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from spin.alignment.core.errors import InputError
from spin.alignment.rewards.base import GroupLabels, PromptGroup, ScorerSettings
from spin.alignment.rewards.classifier import Encoded
from spin.alignment.rewards.conversation import plain_text, template_ids
from spin.alignment.rewards.served_classifier import make_classifier


class RewardModel:
    """Scores from a reward model: its logit, in float64.

    A conversation, including the response, is rendered by the model's own chat template. A tokenizer without a template gets
    the pair of texts (prompt, response); several turns are joined by :func:`plain_text`.
    """

    def __init__(self, settings: ScorerSettings) -> None:
        """Check the model; its weights are loaded at the first uncached response."""
        self.settings = settings
        self.classifier = make_classifier(settings)

    def label(self, groups: Sequence[PromptGroup]) -> list[GroupLabels]:
        """See :meth:`GroupScorer.label`.

        Raises:
            InputError: a conversation is too long or rejected by the template, or its score is not finite; the error names it.
        """
        texts = [group.texts(self.settings.score_reference) for group in groups]
        inputs = [
            self._encode(group, text, group.name(place))
            for group, own in zip(groups, texts, strict=True)
            for place, text in enumerate(own)
        ]
        self.classifier.report_truncated()
        logits = iter(self.classifier.logits(inputs))
        labels = []
        for group, own in zip(groups, texts, strict=True):
            scores: list[float | None] = [next(logits) for _ in own]
            count = len(group.responses)
            labels.append(GroupLabels(scores[:count], reference_score=scores[count] if len(own) > count else None))
        return labels

    def _encode(self, group: PromptGroup, response: str, where: str) -> Encoded:
        tokenizer = self.classifier.tokenizer
        if not tokenizer.chat_template:
            return self._encode_pair(plain_text(group.prompt), response, where)
        ids = template_ids(tokenizer, group.prompt, response, where, group.tools)
        if len(ids) > self.classifier.limit:
            start = int(bool(ids) and ids[0] == tokenizer.bos_token_id)  # truncation keeps the BOS
            prompt = len(template_ids(tokenizer, group.prompt, None, where, group.tools))
            excess = self.classifier.excess(len(ids), max(0, prompt - start), where)
            ids = [*ids[:start], *ids[start + excess :]]
        return Encoded(tuple(ids), None, where)

    def _encode_pair(self, prompt: str, response: str, where: str) -> Encoded:
        # A control token in a text stays text, as in template_ids().
        tokenizer = functools.partial(self.classifier.tokenizer, split_special_tokens=True)
        encoding = tokenizer(prompt, response)
        length = len(encoding["input_ids"])
        if length > self.classifier.limit:
            removable = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            if self.classifier.excess(length, removable, where) == removable:
                encoding = tokenizer("", response)
            else:
                self.classifier.tokenizer.truncation_side = "left"  # the end of the prompt matters most
                encoding = tokenizer(prompt, response, truncation="only_first", max_length=self.classifier.limit)
        if not encoding["input_ids"]:
            raise InputError(f"{where} has no tokens: remove empty rows, or give the model a chat template")
        types = encoding.get("token_type_ids")
        return Encoded(tuple(encoding["input_ids"]), None if types is None else tuple(types), where)

    def close(self) -> None:
        """Free the model."""
        self.classifier.close()
