"""A preference model: a cross-encoder that reads a prompt and two responses and returns the logit that the first is better.

The format of PairRM (arXiv 2306.02561): ``<|source|>prompt``, ``<|candidate1|>first``, ``<|candidate2|>second``, with the
tokenizer's separator after each part and its class token in front, if it has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from spin.alignment.core.arithmetic import sigmoid
from spin.alignment.rewards.base import GroupLabels, PromptGroup, ScorerSettings
from spin.alignment.rewards.classifier import Encoded
from spin.alignment.rewards.conversation import plain_text
from spin.alignment.rewards.served_classifier import make_classifier
from spin.alignment.rewards.win_rates import Pair, both_orders, labels_of

SOURCE, FIRST, SECOND = "<|source|>", "<|candidate1|>", "<|candidate2|>"


class PreferenceModel:
    """Labels from all pairs of a prompt's responses: the full matrix of win probabilities, and mean win rates as scores.

    Both orders of a pair are scored and their probabilities averaged, so P[i][j] + P[j][i] = 1. Equal texts get one half
    without a forward pass.
    """

    def __init__(self, settings: ScorerSettings) -> None:
        """Check the model; its weights are loaded at the first uncached pair."""
        self.settings = settings
        self.classifier = make_classifier(settings)
        tokenizer = self.classifier.tokenizer
        self._start = [token for token in (tokenizer.cls_token_id, tokenizer.bos_token_id) if token is not None][:1]
        self._separator = [tokenizer.sep_token_id] if tokenizer.sep_token_id is not None else []
        ends = [token for token in (tokenizer.sep_token_id, tokenizer.eos_token_id) if token is not None]
        self._end = ends[:1]

    def label(self, groups: Sequence[PromptGroup]) -> list[GroupLabels]:
        """See :meth:`GroupScorer.label`. With ``score_reference`` the ground truth takes part in the comparisons.

        Raises:
            InputError: a pair is too long, or its logit is not finite; the error names the pair.
        """
        texts = [group.texts(self.settings.score_reference) for group in groups]
        inputs: list[Encoded] = []
        for group, own in zip(groups, texts, strict=True):
            for i, j in _different(own):
                inputs += [self._encode(group, own, i, j), self._encode(group, own, j, i)]
        self.classifier.report_truncated()
        logits = iter(self.classifier.logits(inputs))
        labels = []
        for group, own in zip(groups, texts, strict=True):
            wins: dict[Pair, float | None] = {
                pair: both_orders(sigmoid(next(logits)), sigmoid(next(logits))) for pair in _different(own)
            }
            labels.append(labels_of(len(own), wins, with_reference=len(own) > len(group.responses)))
        return labels

    def _encode(self, group: PromptGroup, texts: Sequence[str], first: int, second: int) -> Encoded:
        where = group.name(first, second)
        mark, source = self._ids(SOURCE), self._text_ids(plain_text(group.prompt))
        rest = [
            *self._separator,
            *(*self._ids(FIRST), *self._text_ids(texts[first]), *self._separator),
            *(*self._ids(SECOND), *self._text_ids(texts[second]), *self._end),
        ]
        length = len(self._start) + len(mark) + len(source) + len(rest)
        # Only the start of the prompt may be truncated, never a response.
        excess = self.classifier.excess(length, len(source), where)
        return Encoded((*self._start, *mark, *source[excess:], *rest), None, where)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.classifier.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _text_ids(self, text: str) -> list[int]:
        """Return the ids of a text. A control token in it stays text: a response could otherwise add a candidate of its own."""
        encoding = self.classifier.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        ids: list[int] = encoding["input_ids"]
        return ids

    def close(self) -> None:
        """Free the model."""
        self.classifier.close()


def _different(texts: Sequence[str]) -> list[Pair]:
    """Return the pairs i < j of texts that differ."""
    return [(i, j) for i, j in combinations(range(len(texts)), 2) if texts[i] != texts[j]]
