"""Rows of other tools in the words of the formats: each function returns a row under the names that ``formats.py`` reads.

Prompts and responses: verl, MATH and NuminaMath, MetaMath, OpenMathInstruct, Orca, Dolly, FLAN. Pairs: OpenAI's preference
fine-tuning, PKU-SafeRLHF, UltraFeedback's scores, SPPO's win rates, TIS-DPO's gains of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from spin.alignment.core.errors import InputError

Row = Mapping[str, Any]
Rename = Callable[[Row, str], dict[str, Any]]

# Labels of a pair in other tools -> what this project calls them (docs/data_format.md).
# UltraFeedback, SimPO and Argilla store the scores of the responses; SPPO (compute_prob.py) stores P(chosen beats rejected),
# and the mean win rate of either response against all responses to the prompt.
FOREIGN_LABELS = {
    "score_chosen": "chosen_score",
    "score_rejected": "rejected_score",
    "chosen_probs": "chosen_pair_win_prob",
    "chosen_probs_win": "chosen_win_prob",
    "chosen_probs_lose": "rejected_win_prob",
}
# TIS-DPO's columns (token_weight_estimation.py). They are not weights but log pi_minus(y_t) - log pi_plus(y_t), one for each
# token of the bare response text, without the end of turn; its training negates and transforms them, as its own config says.
_TIS_DPO_GAINS = {"chosen_weight": "chosen_gains", "rejected_weight": "rejected_gains"}
FOREIGN_PAIR_COLUMNS = frozenset({*FOREIGN_LABELS, *_TIS_DPO_GAINS})


def pair_form(row: Row, where: str) -> Row:
    """Return a preference row with ``chosen``, ``rejected`` and labels under this project's names.

    Raises:
        InputError: the row has columns of another tool that cannot be read, or two columns for one label.
    """
    for columns, rename in PAIR_FORMS.items():
        if all(column in row for column in columns) and "chosen" not in row:
            row = rename(row, where)
    if any(isinstance(row.get(column), list | tuple) for column in _TIS_DPO_GAINS):
        row = with_gains(row, where)
    return with_labels(row, where) if not FOREIGN_LABELS.keys().isdisjoint(row) else row


def with_gains(row: Row, where: str) -> dict[str, Any]:
    """Return a row with TIS-DPO's columns as ``chosen_gains`` and ``rejected_gains``.

    A gain is log pi_plus(y_t) - log pi_minus(y_t), in nats.

    Raises:
        InputError: one of the columns is missing, or a value is not a finite number.
    """
    renamed = {name: value for name, value in row.items() if name not in _TIS_DPO_GAINS}
    for column, name in _TIS_DPO_GAINS.items():
        values = row.get(column)
        if not isinstance(values, list | tuple):
            other = next(known for known in _TIS_DPO_GAINS if known != column)
            raise InputError(
                f"{where} has '{other}' but no list '{column}': TIS-DPO's files have both; add it, or remove both"
            )
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"{where}: '{column}' contains {value!r}, not a finite number: correct the row")
        renamed[name] = [-float(value) for value in values]
    return renamed


def with_labels(row: Row, where: str) -> dict[str, Any]:
    """Return a row with the labels of other tools under this project's names.

    Raises:
        InputError: a label is not a number or has two columns, or one of two win rates is missing.
    """
    renamed = {name: value for name, value in row.items() if name not in FOREIGN_LABELS}
    found = {column: row[column] for column in FOREIGN_LABELS if row.get(column) is not None}
    scores = [column for column in ("score_chosen", "score_rejected") if column in found]
    if len(scores) == 1:  # no label of a pair: it stays a column like any other
        renamed[scores[0]] = found.pop(scores[0])
    for column, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where}: '{column}' is {type(value).__name__}, not a number: correct the row")
        if renamed.get(FOREIGN_LABELS[column]) is not None:
            raise InputError(f"{where} has both '{column}' and '{FOREIGN_LABELS[column]}': remove one")
        renamed[FOREIGN_LABELS[column]] = value
    if "chosen_probs" in found:
        renamed["rejected_pair_win_prob"] = 1 - found["chosen_probs"]
    wins = ("chosen_probs_win", "chosen_probs_lose")
    present = [column for column in wins if column in found]
    if len(present) == 1:
        missing = next(column for column in wins if column not in found)
        raise InputError(f"{where} has '{present[0]}' but no '{missing}': add it, or remove both")
    return renamed


def verl(row: Row, where: str) -> dict[str, Any]:
    """verl: ``prompt`` (turns) and ``reward_model.ground_truth``, what a rule compares with; often only the final answer."""
    settings = row["reward_model"]
    if settings is not None and not isinstance(settings, Mapping):
        raise InputError(f"{where}: 'reward_model' is {type(settings).__name__}, not an object: correct the row")
    rest = {name: value for name, value in row.items() if name not in ("prompt", "reward_model")}
    answer = (settings or {}).get("ground_truth")
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = str(answer)
    if answer is not None and not isinstance(answer, str):
        raise InputError(
            f"{where}: 'reward_model.ground_truth' is {type(answer).__name__}, not text: write the answer as text"
        )
    if answer is None:
        prompt = row["prompt"]
        return rest | {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
    return rest | {"prompt": row["prompt"], "response": answer}


def orca(row: Row, where: str) -> dict[str, Any]:
    """Orca: ``system_prompt``, ``question`` and ``response``."""
    turns = [("system", row["system_prompt"])] if row["system_prompt"] else []
    turns += [("user", row["question"]), ("assistant", row["response"])]
    rest = {name: value for name, value in row.items() if name not in ("system_prompt", "question", "response")}
    return rest | {"messages": [{"role": role, "content": content} for role, content in turns]}


def dolly(row: Row, where: str) -> dict[str, Any]:
    """Dolly and others that follow Alpaca: ``instruction``, ``context`` and ``response``."""
    return renamed(row, where, response="output", **({"context": "input"} if "input" not in row else {}))


def openai_preference(row: Row, where: str) -> dict[str, Any]:
    """OpenAI's preference fine-tuning: ``input.messages``, ``preferred_output`` and ``non_preferred_output``."""
    given = row["input"]
    if not isinstance(given, Mapping) or "messages" not in given:
        raise InputError(f"{where}: 'input' must be an object with 'messages': correct the row")
    tools = {"tools": given["tools"]} if given.get("tools") else {}
    named = renamed(row, where, preferred_output="chosen", non_preferred_output="rejected")
    return {name: value for name, value in named.items() if name != "input"} | {"prompt": given["messages"]} | tools


def safe_rlhf(row: Row, where: str) -> dict[str, Any]:
    """PKU-SafeRLHF: ``prompt``, ``response_0``, ``response_1``, and the number of the better one."""
    better = row["better_response_id"]
    if isinstance(better, bool) or better not in (0, 1):
        raise InputError(f"{where}: 'better_response_id' is neither 0 nor 1: correct or remove the row")
    used = ("response_0", "response_1", "better_response_id")
    rest = {name: value for name, value in row.items() if name not in used}
    return rest | {"chosen": row[f"response_{int(better)}"], "rejected": row[f"response_{1 - int(better)}"]}


def renamed(row: Row, where: str, **names: str) -> dict[str, Any]:
    """Return a row with columns under other names; the others stay.

    Raises:
        InputError: the row has a column of the new name too.
    """
    for name, other in names.items():
        if name != other and name in row and row.get(other) is not None:
            raise InputError(
                f"{where} has both '{name}' and '{other}': remove one, or choose with columns in reformat.py"
            )
    return {names.get(name, name): value for name, value in row.items() if name in names or name not in names.values()}


def _pair(question: str, answer: str) -> Rename:
    return lambda row, where: renamed(row, where, **{question: "prompt", answer: "response"})


PAIR_FORMS: dict[tuple[str, ...], Rename] = {
    ("input", "preferred_output", "non_preferred_output"): openai_preference,
    ("prompt", "response_0", "response_1", "better_response_id"): safe_rlhf,
}
# Columns that identify a form -> its function. ``formats.py`` tries them after its own formats, in this order.
FOREIGN_FORMS: dict[tuple[str, ...], Rename] = {
    ("prompt", "reward_model"): verl,
    ("system_prompt", "question", "response"): orca,
    ("instruction", "response"): dolly,
    **PAIR_FORMS,
    **{
        columns: _pair(*columns)
        for columns in (
            ("problem", "solution"),  # MATH, NuminaMath
            ("problem", "generated_solution"),  # OpenMathInstruct-2
            ("problem", "answer"),  # AIME, DeepScaleR
            ("question", "generated_solution"),  # OpenMathInstruct-1
            ("question", "solution"),
            ("question", "response"),  # OpenOrca without system prompts
            ("query", "response"),  # MetaMath
            ("query", "answer"),
            ("inputs", "targets"),  # FLAN, Aya
            ("input", "output"),
        )
    },
}
