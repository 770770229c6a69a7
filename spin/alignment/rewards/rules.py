"""A rule function as a group scorer: each response is scored by itself, and every failure names its row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spin.alignment.core.errors import InputError
from spin.alignment.rewards.base import GroupLabels, Part, PromptGroup, Score, Scorer
from spin.alignment.rewards.row_columns import score_response


def no_reference(scorer: str, prompt_id: str) -> InputError:
    """Return the error for a prompt without the ground truth that a rule needs."""
    return InputError(
        f"scorer {scorer} compares with the ground truth, but prompt {prompt_id} has none: choose another scorer, or remove the "
        "prompt"
    )


@dataclass(frozen=True)
class RuleScorer:
    """Labels from a function of three texts and the columns that it asks for. ``name`` is its name in errors.

    With ``needs_reference``, prompts without a ground truth are refused: a comparison with nothing would give every response
    the same score.
    """

    name: str
    scorer: Scorer
    score_reference: bool = False
    needs_reference: bool = False

    def label(self, groups: Sequence[PromptGroup]) -> list[GroupLabels]:
        """See :meth:`GroupScorer.label`; as pure as the function.

        Raises:
            InputError: the function failed or did not return a finite number, or the ground truth that it needs is missing;
                the error names the prompt and the sample.
        """
        return [self._label_one(group) for group in groups]

    def _label_one(self, group: PromptGroup) -> GroupLabels:
        if self.needs_reference and not (group.reference or "").strip():
            raise no_reference(self.name, group.prompt_id)
        texts = group.texts(self.score_reference)
        found = [self._score(group, text, group.name(place)) for place, text in enumerate(texts)]
        scores: list[float | None] = [score.value for score in found]
        count = len(group.responses)
        return GroupLabels(
            scores[:count],
            reference_score=scores[count] if len(texts) > count else None,
            parts=[score.parts for score in found[:count]] if any(score.parts for score in found) else None,
        )

    def _score(self, group: PromptGroup, response: str, where: str) -> Score:
        try:
            value = score_response(self.scorer, group.question(), response, group.reference or "", group.columns)
        except InputError as error:
            raise InputError(f"scorer {self.name} failed on {where}: {error}") from error
        except Exception as error:  # the function may be the user's own and raise anything
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"scorer {self.name} failed on {where} ({reason}): fix the function") from error
        try:
            numbers = value if isinstance(value, Score) else Score(value, {})
            score = Score(
                float(numbers.value),
                {name: Part(float(part.total), float(part.count)) for name, part in numbers.parts.items()},
            )
        except (TypeError, ValueError, AttributeError):
            raise InputError(f"scorer {self.name} returned {value!r} on {where}: it must return a number") from None
        for number in (score.value, *(n for part in score.parts.values() for n in (part.total, part.count))):
            if not math.isfinite(number):
                raise InputError(f"scorer {self.name} returned {number} on {where}: it must return a finite number")
        return score

    def close(self) -> None:
        """There is nothing to release."""
