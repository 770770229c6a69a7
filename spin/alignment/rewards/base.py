"""The interface of scorers: what they receive and return. No I/O.

A rule scorer is a plain function of three texts and, if it asks for them, of the row's other columns (:class:`Scorer`). A group
scorer (:class:`GroupScorer`) labels all responses to a prompt at once: a model needs batches, and a preference model compares
the responses with each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from spin.alignment.core.settings import setting
from spin.alignment.data.turns import question
from spin.alignment.models.config import Dtype


@dataclass(frozen=True)
class Part:
    """One of several numbers of a score. Over several responses it is the sum of ``total`` divided by the sum of ``count``: the
    mean over responses if ``count`` is 1, otherwise for instance the share of all instructions that were followed."""

    total: float
    count: float = 1.0


@dataclass(frozen=True)
class Score:
    """What a rule returns that has more to say than one number.

    Attributes:
        value: the score, higher is better.
        parts: further numbers by name, which evaluations average and compare.
    """

    value: float
    parts: Mapping[str, Part]


class Scorer(Protocol):
    """Scores one response; higher is better. Further parameters of a rule receive the columns of the row with their names."""

    def __call__(self, prompt: str, response: str, reference: str) -> float | Score:
        """Return a finite number, or a :class:`Score`.

        Args:
            prompt: text of the last user turn.
            response: text of the response, without special tokens.
            reference: the ground truth; empty if there is none.
        """
        ...


@dataclass(frozen=True)
class PromptGroup:
    """All responses to one prompt, by sample index.

    Attributes:
        prompt_id: names the prompt in errors.
        prompt: the conversation before the response: dicts with ``role`` and ``content``.
        responses: texts; sample ``i`` is ``responses[i]``.
        reference: the ground truth, or ``None``.
        tools: JSON text of the tools of the conversation, or ``None``.
        columns: the other columns of the row in the source, for rules.
    """

    prompt_id: str
    prompt: list[dict[str, str]]
    responses: list[str]
    reference: str | None = None
    tools: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    def question(self) -> str:
        """Return the ``prompt`` of a rule function: the text of the last user turn, or of the last turn if there is none."""
        return question(self.prompt)

    def texts(self, with_reference: bool) -> list[str]:
        """Return the responses, followed by the ground truth if it is wanted and available."""
        return [*self.responses, *([self.reference] if with_reference and self.reference is not None else [])]

    def name(self, *places: int) -> str:
        """Return the name of some of :meth:`texts` in errors: ``prompt p1, sample 0 and the ground truth``."""
        names = ["the ground truth" if place == len(self.responses) else f"sample {place}" for place in places]
        return f"prompt {self.prompt_id}, {' and '.join(names)}"


@dataclass(frozen=True)
class GroupLabels:
    """The labels of one prompt's responses, in float64.

    Attributes:
        scores: one per response, higher is better; ``None`` where the scorer failed (an unreadable reply of a judge).
        win_probs: ``[i][k]`` is the probability that response ``i`` beats response ``k``, one half on the diagonal; only given
            by scorers that compare pairs.
        reference_score: the score of the ground truth, if requested and available.
        parts: the further numbers of each response, by name; only given by rules that return a :class:`Score`.
    """

    scores: list[float | None]
    win_probs: list[list[float]] | None = None
    reference_score: float | None = None
    parts: list[Mapping[str, Part]] | None = None


class GroupScorer(Protocol):
    """Labels groups of responses; may own a model or a connection until it is closed."""

    def label(self, groups: Sequence[PromptGroup]) -> list[GroupLabels]:
        """Return the labels of each group, in order."""
        ...

    def close(self) -> None:
        """Release the model or the connection. May be called twice."""
        ...


@dataclass(frozen=True)
class ScorerSettings:
    """Which scorer to use, and its settings. Checked by :func:`spin.alignment.rewards.check_scorer`.

    The programs call ``name`` ``scorer`` and ``cache_dir`` ``score_cache``, and prefix model, batch_size, max_length and dtype
    with ``scorer_``.
    """

    name: str = setting(
        help="what scores the responses: a rule (math_answer, module:function, a weighted sum of them) or a model: "
        "reward_model, preference_model, judge"
    )
    model: str | None = setting(
        None,
        "folder or Hub name of the reward or preference model; the name under which the judge is served",
        path="input",
    )
    batch_size: int = setting(16, "sequences per forward pass, or requests in flight to a server", ge=1)
    max_length: int | None = setting(
        None,
        "maximum tokens per sequence, longer prompts are truncated at the start; for a judge: tokens of its reply",
        unset="the scoring model's context; judge: 512",
        ge=1,
    )
    base_url: str | None = setting(
        None, "address of the server of a judge, or of a reward or preference model that vLLM serves"
    )
    score_reference: bool = setting(False, "score the ground truth as well")
    cache_dir: str | None = setting(None, "folder in which the scores of models are cached", path="folder")
    dtype: Dtype = setting("auto", "precision of the scoring model")
    trust_remote_code: bool = setting(False, "run code that ships with the scoring model")
    all_devices: bool = setting(False, "score on all GPUs of this machine, and not on this process's own alone")
