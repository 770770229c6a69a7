"""A judge: a language model on an OpenAI-compatible server that is asked which of two responses is better."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

from spin.alignment.core.errors import InputError
from spin.alignment.data.thoughts import without_thought
from spin.alignment.rewards.base import GroupLabels, PromptGroup, ScorerSettings
from spin.alignment.rewards.cache import ScoreCache, content_key
from spin.alignment.rewards.conversation import plain_text
from spin.alignment.rewards.win_rates import Pair, both_orders, labels_of

if TYPE_CHECKING:
    from spin.alignment.core.server_link import RetryPolicy

logger = logging.getLogger(__name__)

REPLY_TOKENS = 512
INSTRUCTION = (
    "You compare two responses to the same conversation. Judge how helpful, correct and complete each is; neither its length nor "
    "its position counts. End with your verdict on a line of its own: [[A]] when response A is better, [[B]] when response B is "
    "better, [[tie]] when neither is."
)
_VERDICT = re.compile(r"\[\[\s*(A|B|tie)\s*\]\]", re.IGNORECASE)
# A reply that consists of the verdict alone, perhaps in bold or quotes.
_BARE = re.compile(r"[\s*\"'.]*(?:response\s+)?(A|B|tie)[\s*\"'.]*", re.IGNORECASE)
_FIRST_WINS = {"a": 1.0, "b": 0.0, "tie": 0.5}


class Question(NamedTuple):
    """One pair in one order: ``key`` is a hash of its content, ``where`` names it in errors."""

    key: str
    messages: list[dict[str, str]]
    where: str


class Judge:
    """Labels from a judge's verdicts on every pair in both orders, at temperature 0.

    A reply that cannot be parsed is ignored, counted and logged. If neither reply about a pair can be parsed, a response is
    left without a score.
    """

    def __init__(self, settings: ScorerSettings, policy: RetryPolicy | None = None) -> None:
        """Ask the server which models it serves.

        Raises:
            InputError: the server cannot be reached, or does not serve the judge.
        """
        from spin.alignment.core.server_link import RetryPolicy, ServerLink

        self.settings = settings
        self.policy = policy or RetryPolicy()
        self.reply_tokens = settings.max_length or REPLY_TOKENS
        self.unreadable = 0
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        self.link = ServerLink(settings.base_url, settings.batch_size, key)
        try:
            # Fewer retries than for questions: there is no point in waiting for a server that was never started.
            self.model = self._find_model(policy or RetryPolicy(attempts=3, timeout=30.0))
            self.cache = ScoreCache(
                *(settings.cache_dir, "judge", str(self.link.url), self.model, INSTRUCTION, self.reply_tokens)
            )
        except BaseException:
            self.link.close()
            raise

    def _find_model(self, policy: RetryPolicy) -> str:
        answer = self.link.start(self.link.send("/models", "the request for its models", policy)).result()
        cards = answer.get("data") if isinstance(answer, dict) else None
        names = [str(card["id"]) for card in cards or [] if isinstance(card, dict) and card.get("id")]
        wanted = self.settings.model
        if wanted in names or (wanted is None and len(names) == 1):
            return wanted or names[0]
        served = ", ".join(names) or "no model"
        raise InputError(
            f"the server at {self.link.url} serves {served}: name one of them as the judge's scorer_model"
            + (f", not {wanted}" if wanted else "")
        )

    def label(self, groups: Sequence[PromptGroup]) -> list[GroupLabels]:
        """See :meth:`GroupScorer.label`. With ``score_reference`` the ground truth takes part in the comparisons.

        Raises:
            InputError: the server refused a question or did not answer after all tries; the error names the prompt.
        """
        texts = [group.texts(self.settings.score_reference) for group in groups]
        # Equal responses are a tie without asking.
        pairs = [[(i, j) for i, j in combinations(range(len(own)), 2) if own[i] != own[j]] for own in texts]
        questions = [
            self._question(group, own, *order)
            for group, own, of_group in zip(groups, texts, pairs, strict=True)
            for i, j in of_group
            for order in ((i, j), (j, i))
        ]
        verdicts = iter(self._ask_all(questions))
        labels = []
        for group, own, of_group in zip(groups, texts, pairs, strict=True):
            wins: dict[Pair, float | None] = {pair: both_orders(next(verdicts), next(verdicts)) for pair in of_group}
            labels.append(labels_of(len(own), wins, with_reference=len(own) > len(group.responses)))
        return labels

    def _question(self, group: PromptGroup, texts: Sequence[str], first: int, second: int) -> Question:
        content = (
            f"[Conversation]\n{plain_text(group.prompt)}\n[End of conversation]\n\n"
            f"[Response A]\n{texts[first]}\n[End of response A]\n\n[Response B]\n{texts[second]}\n[End of response B]"
        )
        # A single turn, because not every model has a system role.
        messages = [{"role": "user", "content": f"{INSTRUCTION}\n\n{content}"}]
        return Question(content_key(messages), messages, group.name(first, second))

    def _ask_all(self, questions: Sequence[Question]) -> list[float | None]:
        """Return for each question, in order, the probability that the first response wins; equal questions are asked once."""
        new = {question.key: question for question in questions if question.key not in self.cache}
        found: dict[str, float | None] = {}
        for question, reply in self.link.answers(list(new.values()), self._ask, self.settings.batch_size):
            verdict = read_verdict(reply)
            found[question.key] = verdict
            if verdict is not None:  # an unreadable reply is not cached, so that a rerun asks again
                self.cache.add({question.key: verdict})
        failures = sum(verdict is None for verdict in found.values())
        if failures:
            self.unreadable += failures
            logger.warning(
                "judge: %d of %d replies could not be parsed: no [[A]], [[B]] or [[tie]] in %d tokens (scorer_max_length)",
                *(failures, len(found), self.reply_tokens),
            )
        return [found[item.key] if item.key in found else self.cache[item.key] for item in questions]

    async def _ask(self, question: Question) -> Any:
        body = {
            "model": self.model,
            "messages": question.messages,
            "temperature": 0.0,
            "max_tokens": self.reply_tokens,
            "n": 1,
            "stream": False,
        }
        return await self.link.send("/chat/completions", question.where, self.policy, body, self.reply_tokens)

    def close(self) -> None:
        """Close the connections; the server keeps running. May be called twice."""
        self.cache.close()
        self.link.close()


def read_verdict(answer: Any) -> float | None:
    """Return the probability that response A is better (1, 0 or 1/2) from a chat completion, or ``None`` without a verdict.

    The last ``[[A]]``, ``[[B]]`` or ``[[tie]]`` behind the judge's thoughts counts, or a reply of A, B or tie alone.
    """
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    if not isinstance(text, str):
        return None
    text = without_thought(text)
    found = _VERDICT.findall(text)
    if found:
        return _FIRST_WINS[found[-1].lower()]
    bare = _BARE.fullmatch(text)
    return _FIRST_WINS[bare[1].lower()] if bare else None
