"""Turns the responses of one step into pairs: labels the rows of each prompt, pairs them, and builds inputs for the loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.sides import SIDES
from spin.alignment.methods.labels import SCORE
from spin.alignment.methods.losses import find_loss
from spin.alignment.methods.pairings import find_pairing
from spin.alignment.methods.soft_mean import soft_mean
from spin.alignment.pairs.annotate import Labeller, count_failures
from spin.alignment.rewards import make_scorer
from spin.alignment.training.online.kept_responses import response_rows

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.generation.base import Response
    from spin.alignment.rewards.base import GroupScorer
    from spin.alignment.training.online.config import OnlineConfig
    from spin.alignment.training.online.prompts import OnlinePrompt

logger = logging.getLogger(__name__)


@dataclass
class StepCounts:
    """Counts of the responses of a step: sums over this process, reduced over all processes when logged."""

    prompts: int = 0
    responses: int = 0
    tokens: int = 0
    truncated: int = 0
    scored: int = 0
    score_sum: float = 0.0
    failed: int = 0
    logp_sum: float = 0.0
    logp_tokens: int = 0
    updates: int = 0
    lag: int = 0
    without_pair: int = 0
    unpaired: int = 0
    pairs: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def add_logps(self, responses: Sequence[Response]) -> None:
        """Add the policy's own log-probs (nats) of sampled tokens, where the sampler returned them."""
        for logps in (response.logprobs for response in responses if response.logprobs is not None):
            self.logp_sum += sum(logps)
            self.logp_tokens += len(logps)

    def add(self, rows: Sequence[dict[str, Any]], reads_ground_truth: bool) -> None:
        """Count the responses to one prompt and their scores, including the ground truth's if the pairing reads it."""
        self.responses += len(rows)
        self.tokens += sum(len(row["rejected_token_ids"]) for row in rows)
        self.truncated += sum(row["rejected_finish_reason"] == "length" for row in rows)
        scores = [row["rejected_score"] for row in rows if "rejected_score" in row]
        known = [score for score in scores if score is not None]
        self.scored += len(known)
        self.score_sum += sum(known)
        self.failed += count_failures(rows, reads_ground_truth) if scores else 0


def scorer_of(config: OnlineConfig) -> GroupScorer | None:
    """Return the configured scorer after checking it; None if responses are not scored.

    Raises:
        InputError: the scorer cannot be used.
    """
    return None if config.scorer_settings is None else make_scorer(config.scorer_settings)


class PairMaker:
    """Turns the responses to some prompts into pairs, using the configured scorer and pairing."""

    def __init__(self, config: OnlineConfig, encoder: ChatEncoder, scorer: GroupScorer | None) -> None:
        self.config, self.encoder = config, encoder
        self.pairing = find_pairing(config.pairing).for_baseline(config.baseline)
        self.loss = find_loss(config.loss_type)
        self.labeller = None if scorer is None else Labeller(scorer)
        self.kept: list[dict[str, Any]] = []

    def make(
        self,
        prompts: Sequence[OnlinePrompt],
        responses: Sequence[Sequence[Response]],
        counts: StepCounts,
        keep: int = 0,
    ) -> list[dict[str, Any]]:
        """Return the pairs as features of a batch: ids and the labels that the loss reads. Updates ``counts``, and sets
        :attr:`kept` to the rows of the table of responses for the first ``keep`` prompts.

        Raises:
            InputError: the scorer or the pairing cannot use a row; the message names it.
        """
        features: list[dict[str, Any]] = []
        self.kept = []
        labelled = self.label(prompts, responses, counts)
        for place, (prompt, some, rows) in enumerate(zip(prompts, responses, labelled, strict=True)):
            pairs = self.pairing(rows)
            if place < keep:
                self.kept += response_rows(rows, pairs, [response.logprobs for response in some])
            counts.without_pair += not pairs
            counts.unpaired += self.pairing.unpaired(rows)
            sampled = {tuple(response.token_ids): response.logprobs for response in some}
            made = [self._feature(prompt, pair, sampled) for pair in pairs]
            if self.config.baseline == "prompt" and self.relative_columns():
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
        """Return the labelled rows of each prompt. Updates ``counts``."""
        rows = [self._rows(prompt, some) for prompt, some in zip(prompts, responses, strict=True)]
        if self.labeller is not None:
            self.labeller.label(rows)
        for group, some in zip(rows, responses, strict=True):
            counts.add(group, "chosen_score" in self.config.needs)
            counts.add_logps(some)
        return rows

    def score(
        self, prompts: Sequence[OnlinePrompt], responses: Sequence[Sequence[Response]], counts: StepCounts
    ) -> list[list[float | None]]:
        """Return the scores of held-out responses by prompt; updates ``counts``.

        One that cannot be scored is counted as failed and named in a warning, because an evaluation must not end the training
        that it observes.
        """
        try:
            labelled = self.label(prompts, responses, counts)
        except InputError:
            labelled = []
            # Once more, prompt by prompt, to keep the scores of the others.
            for prompt, some in zip(prompts, responses, strict=True):
                try:
                    labelled += self.label([prompt], [some], counts)
                except InputError as error:
                    labelled.append([row | {"rejected_score": None} for row in self._rows(prompt, some)])
                    counts.add(labelled[-1], False)
                    logger.warning("held-out prompt %s is not scored: %s", prompt.prompt_id, error)
        return [[row.get("rejected_score") for row in rows] for rows in labelled]

    def _rows(self, prompt: OnlinePrompt, responses: Sequence[Response]) -> list[dict[str, Any]]:
        return [
            {
                "prompt_id": prompt.prompt_id,
                "sample_index": sample,
                "chosen": prompt.ground_truth,
                "rejected": [
                    *prompt.messages,
                    {
                        "role": "assistant",
                        "content": self.encoder.response_text(
                            response.token_ids, prompt.carried.get("chat_template_kwargs")
                        ),
                    },
                ],
                "rejected_token_ids": list(response.token_ids),
                "rejected_finish_reason": response.finish_reason,
                "weights_version": response.weights_version,
                **prompt.carried,
            }
            for sample, response in enumerate(responses)
        ]

    def _feature(
        self, prompt: OnlinePrompt, pair: dict[str, Any], sampled: Mapping[tuple[int, ...], list[float] | None]
    ) -> dict[str, Any]:
        """Return a pair as a feature of a batch; ``sampled`` are the sampler's log-probs of responses, by their ids."""
        feature: dict[str, Any] = {"prompt_id": prompt.prompt_id, "prompt_ids": list(prompt.token_ids)}
        for side in SIDES:
            ids = pair.get(f"{side}_token_ids")
            feature[f"{side}_ids"] = list(ids or prompt.ground_truth_ids)
            logps = sampled.get(tuple(ids)) if ids else None
            # NaN: the sampler did not sample these tokens, or did not say how likely they were.
            feature[f"{side}_sampler"] = logps or [math.nan] * len(feature[f"{side}_ids"])
            for label in self.loss.labels:
                # A relative label starts as the plain score; the baseline (prompt or batch) is subtracted later.
                column = SCORE.name if label == self.pairing.relative else label.name
                feature[f"{side}_{label.name}"] = pair[f"{side}_{column}"]
        return feature

    def relative_columns(self) -> list[str]:
        """Return the labels of a pair that the loss reads relative to a baseline."""
        relative = self.pairing.relative
        return [] if relative is None or relative not in self.loss.labels else list(relative.columns)

    def subtract_baseline(self, features: Sequence[dict[str, Any]], scores: Sequence[float]) -> None:
        """Subtract the soft mean of ``scores`` from relative labels, in place (SPPO with rewards)."""
        import torch

        columns = self.relative_columns()
        if not features or not columns:
            return
        baseline = float(soft_mean(torch.tensor(scores, dtype=torch.float64), self.config.soft_mean_b))
        for feature in features:
            for column in columns:
                feature[column] -= baseline
