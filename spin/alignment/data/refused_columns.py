"""Columns of foreign rows and keys of turns that are refused by name: other tools would train on something else with them."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spin.alignment.core.errors import InputError

LABEL_COLUMNS = ("label", "kto_tag")
# How servers and libraries say that a response reached its length limit, or that it ended by itself.
CUT_OFF = frozenset({"length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "model_length"})
ENDED = frozenset({"stop", "eos", "eos_token", "end_turn", "end_of_turn", "stop_sequence", "tool_calls", "tool_use"})


def is_empty(value: Any, depth: int = 16) -> bool:
    """Return whether a value says nothing: null, NaN (pandas' null), blank text, an empty list or object, or one that contains
    only such; what is nested more than ``depth`` deep counts as something."""
    if value is None or isinstance(value, str):
        return value is None or not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    if not depth or not isinstance(value, dict | list | tuple):
        return False
    return all(is_empty(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))


def _is_off(value: Any) -> bool:
    return is_empty(value) or (isinstance(value, bool | int | float) and not value)


def _is_one(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_one(item) for item in value)
    return is_empty(value) or (isinstance(value, bool | int | float) and value == 1)


def _is_metadata(value: Any) -> bool:
    return is_empty(value) or isinstance(value, str)


def _is_not_false(value: Any) -> bool:
    return str(value).strip().lower() not in ("false", "no", "0", "0.0")


def _is_not_true(value: Any) -> bool:
    return str(value).strip().lower() not in ("true", "yes", "1", "1.0")


def _is_not_cut_off(value: Any) -> bool:
    return _is_off(value) or (isinstance(value, str) and value.strip().lower() not in (*CUT_OFF, "true", "yes", "1"))


def _is_no_text(value: Any) -> bool:
    return is_empty(value) or isinstance(value, bool | int | float)


def _is_answer(value: Any) -> bool:
    return is_empty(value) or value in ("final", "all")


def _is_no_list(value: Any) -> bool:
    return is_empty(value) or not isinstance(value, list | tuple)


def _is_verifiable(value: Any) -> bool:
    """Whether these are instructions for a scorer, which the prompt has in words: objects with ``kind``, or their JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return is_empty(value)
    several = isinstance(value, list | tuple) and all(isinstance(item, Mapping) and "kind" in item for item in value)
    return is_empty(value) or several


@dataclass(frozen=True)
class Refusal:
    """A kind of column (or key of a turn) that would change what is trained.

    Attributes:
        why, fix: parts of the message; ``{name}`` is the column.
        names: the columns themselves, also as ``camelCase``.
        words: any column with one of these words in its name, too ...
        unless: ... but not with one of these, which make it a fact about the row.
        allows: whether a value means nothing, so that the column is harmless.
        beside_text: only refused where the prompt was put together from text columns; whole conversations contain it already.
    """

    why: str
    fix: str
    names: frozenset[str] = frozenset()
    words: frozenset[str] = frozenset()
    unless: frozenset[str] = frozenset()
    allows: Callable[[Any], bool] = is_empty
    beside_text: bool = False

    def concerns(self, name: str) -> bool:
        words = words_of(name)
        by_word = not self.words.isdisjoint(words) and self.unless.isdisjoint(words)
        return name in self.names or "_".join(words) in self.names or by_word


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_IGNORE = "or remove the column (spin/reformat.py --ignore_columns {name})"
REFUSALS = (
    Refusal(
        "which a text model cannot see",
        f"remove such rows, {_IGNORE}",
        names=_set("multi_modal_data multi_modal_inputs"),
        words=_set(
            "attachment attachments audio audios image images img imgs multimodal photo photos picture pictures pixel pixels "
            "video videos"
        ),
        allows=_is_off,
    ),
    Refusal(
        "which would weight or mask what is trained",
        f"use turns with weight 0 or 1, or token weights of the pairs, {_IGNORE}",
        names=_set(
            "compute_loss is_trainable is_training learn loss loss_scale train train_detail trainable training_detail"
        ),
        words=_set("weight weights"),
        allows=_is_one,
    ),
    Refusal(
        "which would mask what is trained",
        f"give assistant turns the key 'train' instead, {_IGNORE}",
        words=_set("mask masks masked"),
        allows=_is_off,
    ),
    Refusal(
        "which is neither true nor false",
        f"use true for a good and false for a bad response, rename the column, {_IGNORE}",
        names=frozenset(LABEL_COLUMNS),
    ),
    Refusal(
        "which would change what is learned from the response",
        f"write true or false into a column 'label', rename the column, {_IGNORE}",
        words=_set("label labels"),
        allows=_is_metadata,
    ),
    Refusal(
        "which is false, so the response may be a bad one",
        f"rename the column to 'label', {_IGNORE}",
        names=_set(
            "accepted approved correct desirable good is_accepted is_approved is_chosen is_correct is_good is_passed "
            "is_preferred is_solved is_valid passed preferred solved success successful valid"
        ),
        allows=_is_not_false,
    ),
    Refusal(
        "which is true, so the response may be a bad one",
        f"remove such rows, {_IGNORE}",
        names=_set(
            "bad corrupted deleted failed flagged incorrect invalid is_bad is_corrupted is_deleted is_failed is_flagged "
            "is_incorrect is_invalid is_rejected is_removed is_wrong rejected removed undesirable wrong"
        ),
        allows=_is_not_true,
    ),
    Refusal(
        "by which the response was cut off and would be trained as if it ended there",
        f"remove such rows, {_IGNORE}",
        names=_set("finish_reason finish_reasons finishing_reason stop_reason stopping_reason"),
        words=_set("truncated"),
        allows=_is_not_cut_off,
    ),
    Refusal(
        "but text is tokenized here",
        "remove the column",
        names=_set("input_ids token_ids prompt_ids completion_ids response_ids prompt_token_ids response_token_ids"),
        allows=_is_no_list,
    ),
    Refusal(
        "which a chat template would read",
        f"write it into the column chat_template_kwargs, {_IGNORE}",
        names=_set(
            "add_generation_prompt builtin_tools chat_template continue_final_message date_string documents enable_thinking "
            "model_identity reasoning_effort thinking_budget"
        ),
    ),
    Refusal(
        "which may contain the thoughts before the response",
        f"rename it to reasoning_content to train on it, {_IGNORE}",
        names=_set(
            "chain_of_thought cot inner_thoughts rationale reasoning_chain reasoning_details reasoning_text reasoning_trace "
            "scratchpad think thinking_blocks thinking_content thought thoughts"
        ),
    ),
    Refusal(
        "which would change the tools of the conversation",
        f"write tools into the column 'tools' and calls into the assistant turn ('tool_calls'), {_IGNORE}",
        names=_set(
            "available_tools function_call function_calls function_list tool_call tool_calls tool_definitions tool_responses "
            "tools_json"
        ),
    ),
    Refusal(
        "which may be a system prompt",
        f"rename it to system to train with it, {_IGNORE}",
        names=_set(
            "developer_instructions developer_message developer_prompt preprompt sys_prompt system_content system_instruction "
            "system_instructions system_message system_prompt system_text"
        ),
    ),
    Refusal(
        "which would change the prompt",
        f"write it into the prompt, {_IGNORE}",
        names=_set(
            "background history input inputs instruction prefix schema starter_code suffix support table A B C D E"
        ),
        words=_set(
            "article articles choice choices context contexts ctx ctxs distractor distractors document documents evidence fact "
            "facts hypothesis knowledge option options paragraph paragraphs passage passages premise"
        ),
        unless=_set(
            "category count domain file hash id ids index label language length name num number source title type url"
        ),
        allows=_is_no_text,
        beside_text=True,
    ),
    Refusal(
        "which would change the prompt",
        f"write it into the prompt, {_IGNORE}",
        names=_set("instructions"),
        allows=_is_verifiable,
        beside_text=True,
    ),
)
# Keys of a turn only.
TURN_REFUSALS = (
    Refusal(
        "which would change the turn",
        "write whole turns of text, or remove the key",
        names=_set("prefix partial prefill refusal"),
        allows=_is_off,
    ),
    Refusal(
        "which would mask the turn",
        "give assistant turns the key 'train' instead",
        names=_set("no_grad no_loss no_train"),
        words=_set("exclude excluded ignore ignored skip skipped"),
        allows=_is_off,
    ),
    Refusal(
        "which would mask the turn",
        "give assistant turns the key 'train' instead",
        names=_set("train_detail training_detail"),
        words=_set("learn learned learnable train trained trainable training"),
        allows=_is_one,
    ),
    Refusal(
        "which may make it a thought or a tool call",
        "write thoughts into 'reasoning_content' and calls into 'tool_calls' of the assistant turn, or remove the key",
        names=_set("channel recipient"),
        allows=_is_answer,
    ),
    Refusal(
        "which would change the tools of the conversation",
        "write tools into the column 'tools' of the row, and calls into 'tool_calls' of the assistant turn",
        names=_set("tools functions function_calls tool_responses"),
    ),
)


# Columns beside chosen and rejected only.
PAIR_REFUSALS = (
    Refusal(
        "which may turn the preference around",
        "swap or remove such rows, or remove the column",
        names=_set("equal flipped is_equal is_flipped is_reversed is_swapped is_tie reversed swapped tie"),
        allows=_is_not_true,
    ),
    Refusal(
        "which may turn the preference around",
        "swap or remove such rows, or remove the column",
        names=_set("better better_response preferred preferred_response winner"),
        allows=lambda value: (
            str(value).strip().lower() not in ("rejected", "tie", "equal", "both", "neither", "none_of_them")
        ),
    ),
)


def words_of(name: str) -> list[str]:
    """Return the words of a column's name, in lower case: ``pixelValues_1`` has pixel, values and 1."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)]


@functools.lru_cache(maxsize=4096)
def refusals_of(name: str) -> list[Refusal]:
    """Return the kinds of :data:`REFUSALS` that a column's name belongs to; the first one decides."""
    return [refusal for refusal in REFUSALS if refusal.concerns(name)]


@functools.lru_cache(maxsize=4096)
def pair_refusals_of(name: str) -> list[Refusal]:
    """Return the kinds of :data:`PAIR_REFUSALS` that a column's name belongs to."""
    return [refusal for refusal in PAIR_REFUSALS if refusal.concerns(name)]


def check_column(name: str, value: Any, where: str, whole: bool = True) -> None:
    """Check that a column that no reader has used does not change what is trained.

    Args:
        whole: the prompt was given as whole turns; with False it was put together from text columns.

    Raises:
        InputError: it does; the message names it and the fix.
    """
    for refusal in refusals_of(name)[:1]:
        if not (refusal.beside_text and whole) and not refusal.allows(value):
            raise InputError(f"{where} has '{name}', {refusal.why}: {refusal.fix.format(name=name)}")


def check_pair_column(name: str, value: Any, where: str) -> None:
    """Check that a column beside the responses of a pair does not turn its preference around.

    Raises:
        InputError: it does; the message names it and the fix.
    """
    for refusal in pair_refusals_of(name):
        if not refusal.allows(value):
            raise InputError(f"{where} has '{name}' {value!r}, {refusal.why}: {refusal.fix}")


def check_turn_key(name: str, value: Any, where: str) -> None:
    """Check that an unknown key of a turn does not change what is trained.

    Raises:
        InputError: it does; the message names it and the fix.
    """
    kinds = [refusal for refusal in TURN_REFUSALS if refusal.concerns(name)] or refusals_of(name)
    for refusal in kinds[:1]:
        if not refusal.beside_text and not refusal.allows(value):
            fix = refusal.fix.partition(f", {_IGNORE}")[0].format(name=name)
            raise InputError(f"{where} has a turn with '{name}', {refusal.why}: {fix}")
