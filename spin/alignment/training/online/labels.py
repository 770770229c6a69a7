"""From responses to the pairs of one step: labels on rows, one prompt's rows at a time, then ids and numbers for the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spin.alignment.methods.losses import LOSS_COLUMNS, loss_feature, soft_mean
from spin.alignment.methods.pairings import PAIRINGS, Labelled
from spin.alignment.pairs.annotate import Labeller, count_failures
from spin.alignment.rewards import make_scorer

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.generation.base import Response
    from spin.alignment.rewards.base import GroupScorer
    from spin.alignment.training.online.config import OnlineConfig
    from spin.alignment.training.online.prompts import OnlinePrompt

HALVES = ("chosen", "rejected")


@dataclass
class StepCounts:
    """What became of the responses of a step: sums over this process, reduced over all when they are logged."""

    prompts: int = 0
    responses: int = 0
    tokens: int = 0
    truncated: int = 0
    scored: int = 0
    score_sum: float = 0.0
    failed: int = 0
    without_pair: int = 0
    unpaired: int = 0
    pairs: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, rows: Sequence[dict[str, Any]], reads_truth: bool) -> None:
        """Count the responses to one prompt and their scores, that of the ground truth too where the pairing reads it."""
        self.responses += len(rows)
        self.tokens += sum(len(row["rejected_token_ids"]) for row in rows)
        self.truncated += sum(row["rejected_finish_reason"] == "length" for row in rows)
        scores = [row["rejected_score"] for row in rows if "rejected_score" in row]
        known = [score for score in scores if score is not None]
        self.scored += len(known)
        self.score_sum += sum(known)
        self.failed += count_failures(rows, reads_truth) if scores else 0


def scorer_of(config: OnlineConfig) -> GroupScorer | None:
    """Return the scorer that the settings name, checked; None where no response is scored.

    Raises:
        InputError: the scorer cannot be used.
    """
    return None if config.scorer_settings is None else make_scorer(config.scorer_settings)


class PairMaker:
    """Turns the responses of some prompts into pairs, as the settings of the method say."""

    def __init__(self, config: OnlineConfig, encoder: ChatEncoder, scorer: GroupScorer | None) -> None:
        self.config, self.encoder = config, encoder
        self.labeller = None if scorer is None else Labeller(scorer)

    def make(
        self, prompts: Sequence[OnlinePrompt], responses: Sequence[Sequence[Response]], counts: StepCounts
    ) -> list[dict[str, Any]]:
        """Return the pairs as features of a batch: ids, and the labels its loss reads; ``counts`` grows.

        Raises:
            InputError: the scorer or the pairing cannot use a row; it is named.
        """
        features: list[dict[str, Any]] = []
        for prompt, rows in zip(prompts, self.label(prompts, responses, counts), strict=True):
            pairing = PAIRINGS[self.config.pairing]
            pairs = pairing(rows)
            counts.without_pair += not pairs
            counts.unpaired += pairing.unpaired(rows) if isinstance(pairing, Labelled) else 0
            made = [self._feature(prompt, pair) for pair in pairs]
            if self.config.loss_type == "sppo_reward" and self.config.baseline == "prompt":
                self.subtract_baseline(
                    made, [row["rejected_score"] for row in rows if row["rejected_score"] is not None]
                )
            features += made
        counts.prompts += len(prompts)
        counts.pairs += len(features)
        return features

    def label(
        self, prompts: Sequence[OnlinePrompt], responses: Sequence[Sequence[Response]], counts: StepCounts
    ) -> list[list[dict[str, Any]]]:
        """Return the rows of each prompt with their labels; ``counts`` grows."""
        rows = [self._rows(prompt, some) for prompt, some in zip(prompts, responses, strict=True)]
        if self.labeller is not None:
            self.labeller.label(rows)
        for group in rows:
            counts.add(group, "chosen_score" in self.config.needs)
        return rows

    def _rows(self, prompt: OnlinePrompt, responses: Sequence[Response]) -> list[dict[str, Any]]:
        return [
            {
                "prompt_id": prompt.prompt_id,
                "sample_index": sample,
                "chosen": prompt.truth,
                "rejected": [
                    *prompt.messages,
                    {"role": "assistant", "content": self.encoder.decode(response.token_ids)},
                ],
                "rejected_token_ids": list(response.token_ids),
                "rejected_finish_reason": response.finish_reason,
            }
            for sample, response in enumerate(responses)
        ]

    def _feature(self, prompt: OnlinePrompt, pair: dict[str, Any]) -> dict[str, Any]:
        feature: dict[str, Any] = {"prompt_ids": list(prompt.token_ids)}
        column = LOSS_COLUMNS.get(self.config.loss_type)
        for half in HALVES:
            ids = pair.get(f"{half}_token_ids")
            feature[f"{half}_ids"] = list(ids or prompt.truth_ids)
            if column == "reward":  # the baseline, of this prompt or of all, is taken off here
                feature[f"{half}_reward"] = pair[f"{half}_score"]
            elif column is not None:
                feature[f"{half}_{loss_feature(column)}"] = pair[f"{half}_{column}"]
        return feature

    def subtract_baseline(self, features: Sequence[dict[str, Any]], scores: Sequence[float]) -> None:
        """Make rewards relative to the soft mean of ``scores`` (SPPO with rewards)."""
        import torch

        if not features:
            return
        baseline = float(soft_mean(torch.tensor(scores, dtype=torch.float64), self.config.soft_mean_b))
        for feature in features:
            for half in HALVES:
                feature[f"{half}_reward"] -= baseline
