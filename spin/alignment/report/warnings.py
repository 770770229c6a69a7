"""Warnings: what to know before trusting the table of a run, computed from its training logs and held-out responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from spin.alignment.report.verdicts import of_role

Row = dict[str, Any]

# Half of the pairs then teach nothing, so most of the compute of the iteration was spent without effect.
IDENTICAL_RATE = 0.5
# One response in twenty without an EOS is enough for a model to unlearn ending its answers.
TRUNCATION_RATE = 0.05
# Preference training moves lengths by a few per cent; judges reward length, so a fifth can explain a win rate by itself.
LENGTH_DRIFT = 0.2
# The loss of a pair that is told apart this reliably has almost no gradient left.
SATURATED_ACCURACY = 0.99
# exp(-0.5): the response that should be learned has become 40 % less likely.
CHOSEN_DRIFT_NATS = 0.5
# The KL divergence of an iteration from its own opponent: it should shrink as the opponent gets better, not double...
KL_GROWTH = 2.0
# ...and below this many nats per response a factor of two is noise.
KL_NATS = 2.0
# One 4-gram in twenty more than at the start is said twice: loops that a reader sees.
REPETITION_RISE = 0.05
# Sampling noise of distinct-2 on a few hundred prompts is 2 to 3 %; a fifth is a loss of vocabulary. A model that becomes surer
# samples fewer odd tokens, down to what its start says greedily: only below that has it lost something.
DISTINCT_FALL = 0.2
# More ties than decisions: the judge or metric cannot tell the models apart.
TIE_RATE = 0.5
# Percentage points of a win rate that disappear at equal lengths.
LENGTH_SHARE = 0.1


def warnings(rows: Sequence[Row], drops_identical: bool = False) -> list[str]:
    """Return the warnings about all models; ``drops_identical``: identical responses are not trained on.

    ``rows`` are those of the summary.
    """
    start = of_role(rows, "start") or {}
    policies = {row["iteration"]: row for row in rows if row.get("role") == "policy"}
    lines: list[str] = []
    for row in rows:
        number = row.get("iteration")
        before = policies.get(number - 1) if number is not None and row.get("role") == "policy" else None
        found = (*of_training(row, before, drops_identical), *of_responses(row, start), *of_comparison(row, start))
        lines += [f"{row['model']}: {line}" for line in found]
    return lines


def of_training(row: Row, before: Row | None, drops_identical: bool) -> Iterator[str]:
    """Yield what the training of a model shows; ``before`` is the policy of the iteration before."""
    if row.get("chosen_drift", 0.0) < -CHOSEN_DRIFT_NATS:
        yield (
            f"the log-probability of the chosen responses fell by {-row['chosen_drift']:.2f} nats: add nll_weight or lower the "
            "learning rate"
        )
    kl, earlier = -row.get("rejected_drift", 0.0), -(before or {}).get("rejected_drift", 0.0)
    if before is not None and "rejected_drift" in before and kl > max(KL_NATS, KL_GROWTH * earlier):
        yield (
            f"its KL divergence from its opponent grew from {earlier:.1f} to {kl:.1f} nats per response since {before['model']}: "
            "raise beta or lower the learning rate"
        )
    if not drops_identical and row.get("identical_rate", 0.0) > IDENTICAL_RATE:
        yield (
            f"{row['identical_rate']:.0%} of the responses equal the ground truth and teach nothing: set convert.identical to "
            "drop"
        )
    if row.get("reward_accuracy", 0.0) >= SATURATED_ACCURACY:
        yield f"reward accuracy {row['reward_accuracy']:.3f} is saturated: train for fewer epochs"


def of_responses(row: Row, start: Row) -> Iterator[str]:
    """Yield what the responses of a model show, some of it in comparison with the start."""
    if row.get("skipped"):
        yield f"{row['skipped']} held-out rows or responses skipped: eval.json names them"
    for key, what in (("truncation_rate", "held-out"), ("generated_truncation_rate", "generated")):
        if row.get(key, 0.0) > TRUNCATION_RATE:
            yield f"{row[key]:.0%} of the {what} responses were truncated by max_new_tokens: raise it"
    base = start.get("mean_length")
    if base and abs(row.get("mean_length", base) / base - 1) > LENGTH_DRIFT:
        yield f"mean length moved from {base:.1f} to {row['mean_length']:.1f} tokens since SFT"
    if "repetition_rate" in start and row.get("repetition_rate", 0.0) > start["repetition_rate"] + REPETITION_RISE:
        yield (
            f"repeated 4-grams rose from {start['repetition_rate']:.1%} to {row['repetition_rate']:.1%} since SFT: lower the "
            "learning rate, or stop earlier"
        )
    diversity = min((start[key] for key in ("distinct_2", "greedy_distinct_2") if key in start), default=None)
    if diversity and row.get("distinct_2", diversity) < (1 - DISTINCT_FALL) * diversity:
        yield (
            f"distinct-2 is {row['distinct_2']:.3f}, SFT's at least {diversity:.3f}: its vocabulary collapses, raise beta or "
            "stop earlier"
        )


def of_comparison(row: Row, start: Row) -> Iterator[str]:
    """Yield what the comparison of a model with the start shows: ties, wins by length, and signs of reward hacking."""
    if row.get("tie_rate", 0.0) > TIE_RATE:
        yield f"{row['tie_rate']:.0%} of the comparisons with SFT are ties: the win rate says little"
    if row.get("win_rate") is not None and row["win_rate"] - row["lc_win_rate"] > LENGTH_SHARE:
        yield (
            f"its win rate of {row['win_rate']:.1%} against SFT is {row['lc_win_rate']:.1%} at equal lengths: it owes much to "
            "longer responses"
        )
    gains = [key for key in ("sampled_exact", "greedy_exact") if _clearly(row, key, 1)]
    signs = list(_hacking_signs(row, start)) if gains else []
    if signs:
        yield f"its score rose since SFT, but {' and '.join(signs)}: read some responses, the metric may be gamed"


def _hacking_signs(row: Row, start: Row) -> Iterator[str]:
    """Yield what a rise of a score should not come with (reward over-optimisation: arXiv 2210.10760)."""
    base = start.get("mean_length")
    if base and row.get("mean_length", base) / base - 1 > LENGTH_DRIFT:
        yield f"its responses became {row['mean_length'] / base - 1:.0%} longer"
    if "repetition_rate" in start and row.get("repetition_rate", 0.0) > start["repetition_rate"] + REPETITION_RISE:
        yield "it repeats itself more"
    if row.get("lc_win_rate_interval", (0.0, 1.0))[1] < 0.5:
        yield f"it wins only {row['lc_win_rate']:.1%} of the comparisons at equal lengths"


def _clearly(row: Row, key: str, sign: int) -> bool:
    found = row.get("against_start", {}).get(key)
    return found is not None and found["p_value"] < 0.05 and sign * found["difference"] > 0
