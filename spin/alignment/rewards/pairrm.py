"""PairRM (arXiv 2306.02561) with the arithmetic of its authors' code: the preference model of SPPO's published runs.

Each part of an input has class and separator tokens of its own: ``[CLS]<|source|>prompt[SEP] [CLS]<|candidate1|>first[SEP]
[CLS]<|candidate2|>second[SEP]``. The source is cut at its end to 1224 tokens. The candidates are cut at their end to 412 tokens,
and each gets half of what a shorter source leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.rewards.base import GroupLabels, PromptGroup, ScorerSettings
from spin.alignment.rewards.classifier import Encoded, SequenceClassifier
from spin.alignment.rewards.conversation import plain_text
from spin.alignment.rewards.pairrm_checkpoint import FIRST, MARKS, SECOND, SOURCE, check_pairrm, load_pairrm
from spin.alignment.rewards.win_rates import Pair, labels_of, probabilities_of

logger = logging.getLogger(__name__)


class PairRM:
    """Labels from the logits of all pairs of a prompt's responses, each in both orders.

    The score s_i of LLM-Blender's ``rank`` is the mean over all responses k, including i itself (0), of
    logit(i, k) - logit(k, i). SPPO's code takes P(i beats k) = sigmoid(s_i - s_k). Scores are mean win rates, as those of every
    preference model. Equal texts need no forward pass.
    """

    def __init__(self, settings: ScorerSettings) -> None:
        """Check the checkpoint and load its tokenizer; its weights are loaded at the first uncached pair."""
        self.settings = settings
        self.classifier = PairRMClassifier(settings)

    def label(self, groups: Sequence[PromptGroup]) -> list[GroupLabels]:
        """See :meth:`GroupScorer.label`. With ``score_reference`` the ground truth takes part in the comparisons.

        Raises:
            InputError: a logit is not finite; the error names the pair.
        """
        texts = [group.texts(self.settings.score_reference) for group in groups]
        pairs = [[(i, j) for i, j in combinations(range(len(own)), 2) if own[i] != own[j]] for own in texts]
        inputs: list[Encoded] = []
        for group, own, of_group in zip(groups, texts, pairs, strict=True):
            if of_group:
                source, candidates = self.classifier.encode(plain_text(group.prompt), own)
                for order in (order for i, j in of_group for order in ((i, j), (j, i))):
                    ids = self.classifier.joined(source, *(candidates[place] for place in order))
                    inputs.append(Encoded(ids, None, group.name(*order)))
        self.classifier.report_truncated()
        logits = iter(self.classifier.logits(inputs))
        labels = []
        for group, own, of_group in zip(groups, texts, pairs, strict=True):
            margins: dict[Pair, float] = {pair: next(logits) - next(logits) for pair in of_group}
            with_reference = len(own) > len(group.responses)
            labels.append(labels_of(len(own), probabilities_of(len(own), margins), with_reference))
        return labels

    def close(self) -> None:
        """Free the model."""
        self.classifier.close()


class PairRMClassifier(SequenceClassifier):
    """The model, its tokenizer and its cached logits."""

    def _check(self) -> dict[str, Any]:
        check_settings(self.settings)
        self.checkpoint = check_pairrm(self.folder)
        self.cut_sources = self.cut_candidates = 0
        config: dict[str, Any] = self.checkpoint.encoder.to_dict()
        return config

    def _make_tokenizer(self) -> Any:
        tokenizer = pairrm_tokenizer(self.folder)
        self.mark_ids = tuple(tokenizer.convert_tokens_to_ids(mark) for mark in MARKS)
        expected = self.checkpoint.mark_ids
        if expected is not None and expected != self.mark_ids:
            raise InputError(
                f"config.json in {self.folder} gives PairRM's marks the ids {expected}, but its tokenizer has {self.mark_ids}: "
                "copy the folder again"
            )
        self._ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        for mark, token in zip(MARKS, self.mark_ids, strict=True):
            if tokenizer(mark)["input_ids"] != [self._ends[0], token, self._ends[1]]:
                raise InputError(
                    f"the tokenizer in {self.folder} does not encode {mark} as one token between its class and separator tokens: "
                    "restore the tokenizer of PairRM"
                )
        return tokenizer

    def _limit(self) -> int:
        return self.checkpoint.source_length + 2 * self.checkpoint.candidate_length

    def encode(self, prompt: str, texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Return the ids of the source and of each text as a candidate, with the first candidate's mark."""
        checkpoint = self.checkpoint
        source = self._part(SOURCE, prompt)
        kept = self._shortened(source, checkpoint.source_length)
        self.cut_sources += len(kept) < len(source)
        longest = checkpoint.candidate_length + (checkpoint.source_length - len(kept)) // 2
        candidates = [self._part(FIRST, text) for text in texts]
        self.cut_candidates += sum(len(ids) > longest for ids in candidates)
        return kept, [self._shortened(ids, longest) for ids in candidates]

    def joined(self, source: Sequence[int], first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
        """Return one input from parts of :meth:`encode`: the second candidate gets the second mark."""
        return (*source, *first, second[0], self.mark_ids[MARKS.index(SECOND)], *second[2:])

    def _part(self, mark: str, text: str) -> list[int]:
        """Return ``[CLS] mark text [SEP]``; the mark is encoded with the text, which decides about a space between them."""
        start, end = self._ends
        text = text.replace(self.tokenizer.sep_token, " ")  # as in the authors' code
        ids: list[int] = self.tokenizer(mark + text)["input_ids"]
        # A mark in a text, also in other characters that mean the same, would be a candidate of its own.
        inner = [token for token in ids[2:-1] if token not in self.mark_ids and token != end]
        return [start, ids[1], *inner, end]

    def _shortened(self, ids: list[int], longest: int) -> list[int]:
        return ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]]

    def report_truncated(self) -> None:
        """Log how many texts were cut since the last report."""
        if self.cut_sources or self.cut_candidates:
            logger.warning(
                "PairRM reads at most %d tokens of a prompt and a response in what is left of %d: %d prompts and %d responses "
                "had their end truncated",
                *(self.checkpoint.source_length, self.limit, self.cut_sources, self.cut_candidates),
            )
            self.cut_sources = self.cut_candidates = 0

    def _load(self) -> Any:
        source, first, second, _ = self.mark_ids
        return load_pairrm(self.checkpoint, (source, first, second), self.dtype)


def check_settings(settings: ScorerSettings) -> None:
    """Refuse settings that would change what PairRM reads.

    Raises:
        InputError: ``scorer_max_length`` is set.
    """
    if settings.max_length is not None:
        raise InputError(
            f"scorer_max_length is {settings.max_length}, but PairRM truncates prompts and responses to the lengths it was "
            "trained with: remove it"
        )


def pairrm_tokenizer(folder: Path) -> Any:
    """Return the tokenizer exactly as saved, with PairRM's marks.

    transformers 5 rebuilds a DeBERTa tokenizer that is loaded by its name, without the normalisation of its file, so it is loaded
    here without its name.

    Raises:
        InputError: there is none, or it is damaged.
    """
    from transformers import PreTrainedTokenizerFast

    from spin.alignment.core.errors import reason_of

    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder} has no tokenizer.json: copy the folder again, with the tokenizer that PairRM is published with"
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # damaged files fail anywhere, and the tokenizers library raises bare Exceptions
        raise InputError(
            f"cannot load the tokenizer of {folder} ({reason_of(error)}): copy the folder again"
        ) from error
    # The ranker's own code adds them after loading; PairRM-hf was saved with them.
    tokenizer.add_tokens([mark for mark in MARKS if mark not in tokenizer.get_vocab()])
    return tokenizer
