"""A reward model: a sequence classifier with one output that reads a conversation and says how good its last turn is."""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.errors import InputError
from spin.alignment.scoring.base import GroupLabels, PromptGroup, ScorerSettings
from spin.alignment.scoring.classifier import Encoded, SequenceClassifier
from spin.alignment.scoring.conversation import plain_text, template_ids


class RewardModel:
    """Scores by a reward model: its logit, in float64.

    A conversation goes through the model's own chat template, response included. A tokenizer without a template gets the pair of
    texts (prompt, response); several turns are joined by :func:`plain_text`.
    """

    def __init__(self, settings: ScorerSettings) -> None:
        """Check the model; its weights are loaded when the first unknown response comes."""
        self.settings = settings
        self.classifier = SequenceClassifier(settings)

    def label(self, groups: Sequence[PromptGroup]) -> list[GroupLabels]:
        """See :meth:`GroupScorer.label`.

        Raises:
            InputError: a conversation is too long or refused by the template, or its score is not finite; it is named.
        """
        inputs = [self._encode(group, text, where) for group in groups for text, where in self._texts(group)]
        self.classifier.report_cuts()
        scores = iter(self.classifier.logits(inputs))
        labels = []
        for group in groups:
            own: list[float | None] = [next(scores) for _ in group.responses]
            labels.append(
                GroupLabels(own, reference_score=next(scores) if self._reference(group) is not None else None)
            )
        return labels

    def _reference(self, group: PromptGroup) -> str | None:
        return group.reference if self.settings.score_reference else None

    def _texts(self, group: PromptGroup) -> list[tuple[str, str]]:
        """Return what is scored of a prompt, with its name in errors: the responses, then the ground truth."""
        texts = [(text, f"prompt {group.prompt_id}, sample {index}") for index, text in enumerate(group.responses)]
        reference = self._reference(group)
        if reference is not None:
            texts.append((reference, f"prompt {group.prompt_id}, the ground truth"))
        return texts

    def _encode(self, group: PromptGroup, response: str, where: str) -> Encoded:
        tokenizer = self.classifier.tokenizer
        if not tokenizer.chat_template:
            return self._encode_pair(plain_text(group.prompt), response, where)
        ids = template_ids(tokenizer, group.prompt, response, where)
        if len(ids) > self.classifier.limit:
            start = int(bool(ids) and ids[0] == tokenizer.bos_token_id)
            prompt = len(template_ids(tokenizer, group.prompt, None, where))
            excess = self.classifier.excess(len(ids), max(0, prompt - start), where)
            ids = [*ids[:start], *ids[start + excess :]]
        return Encoded(tuple(ids), None, where)

    def _encode_pair(self, prompt: str, response: str, where: str) -> Encoded:
        tokenizer = self.classifier.tokenizer
        encoding = tokenizer(prompt, response)
        length = len(encoding["input_ids"])
        if length > self.classifier.limit:
            cuttable = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            if self.classifier.excess(length, cuttable, where) == cuttable:
                encoding = tokenizer("", response)
            else:
                tokenizer.truncation_side = "left"
                encoding = tokenizer(prompt, response, truncation="only_first", max_length=self.classifier.limit)
        if not encoding["input_ids"]:
            raise InputError(f"{where} has no token at all: leave empty rows out, or give the model a chat template")
        types = encoding.get("token_type_ids")
        return Encoded(tuple(encoding["input_ids"]), None if types is None else tuple(types), where)

    def close(self) -> None:
        """Give the model back."""
        self.classifier.close()
