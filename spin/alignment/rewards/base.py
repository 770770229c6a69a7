"""What scorers receive and return. No I/O, no project imports.

A rule scorer is a plain function of three texts (:class:`Scorer`). A group scorer (:class:`GroupScorer`) labels all responses to
a prompt at once, which a model needs for its batches and a preference model because it compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Scorer(Protocol):
    """Scores one response; higher is better."""

    def __call__(self, prompt: str, response: str, reference: str) -> float:
        """Return a finite number.

        Args:
            prompt: text of the last user turn.
            response: text of the response, without special tokens.
            reference: the ground truth; empty where there is none.
        """
        ...


@dataclass(frozen=True)
class PromptGroup:
    """All responses to one prompt, by sample index.

    Attributes:
        prompt_id: names the prompt in errors.
        prompt: the conversation up to the response: dicts with ``role`` and ``content``.
        responses: texts; sample ``i`` is ``responses[i]``.
        reference: the ground truth, ``None`` where there is none.
    """

    prompt_id: str
    prompt: list[dict[str, str]]
    responses: list[str]
    reference: str | None = None

    def question(self) -> str:
        """Return what a rule function calls the prompt: the text of the last user turn, else of the last turn."""
        turns = [turn for turn in self.prompt if turn.get("role") == "user"] or self.prompt
        return turns[-1]["content"] if turns else ""

    def texts(self, with_reference: bool) -> list[str]:
        """Return the responses, then the ground truth when it is wanted and there."""
        return [*self.responses, *([self.reference] if with_reference and self.reference is not None else [])]

    def name(self, *places: int) -> str:
        """Return what errors call some of :meth:`texts`: ``prompt p1, sample 0 and the ground truth``."""
        names = ["the ground truth" if place == len(self.responses) else f"sample {place}" for place in places]
        return f"prompt {self.prompt_id}, {' and '.join(names)}"


@dataclass(frozen=True)
class GroupLabels:
    """What a scorer says about one prompt, in float64.

    Attributes:
        scores: one for each response, higher is better; ``None`` where the scorer failed (an unreadable reply of a judge).
        win_probs: ``[i][k]`` is the probability that response ``i`` beats response ``k``, one half on the diagonal; only a
            preference model that answered about every pair gives it.
        reference_score: of the ground truth, when it was asked for and there is one.
    """

    scores: list[float | None]
    win_probs: list[list[float]] | None = None
    reference_score: float | None = None


class GroupScorer(Protocol):
    """Labels groups of responses; may hold a model or a connection until it is closed."""

    def label(self, groups: Sequence[PromptGroup]) -> list[GroupLabels]:
        """Return the labels of each group, in order."""
        ...

    def close(self) -> None:
        """Give up the model or the connection. May be called twice."""
        ...


@dataclass(frozen=True)
class ScorerSettings:
    """Which scorer, and what it needs.

    Attributes:
        name: a rule (``math_answer``, ``module:function``, a weighted sum of them), or ``reward_model``, ``preference_model``,
            ``judge``.
        model: folder or Hub name of the reward or preference model; the served name of the judge.
        batch_size: sequences in one forward pass, or requests in flight (judge).
        max_length: tokens of one sequence; longer ones lose the start of their prompt, counted and logged. ``None``: the
            model's context, and a longer one is an error that names it. Of a judge: tokens of its reply (512).
        base_url: address of the judge's server.
        score_reference: score the ground truth as well.
        cache_dir: folder in which the scores of models are kept; rule functions are quicker than any cache.
        dtype: precision of the weights: auto, float32, bfloat16, float16.
        trust_remote_code: run code that comes with the model.
    """

    name: str
    model: str | None = None
    batch_size: int = 16
    max_length: int | None = None
    base_url: str | None = None
    score_reference: bool = False
    cache_dir: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
