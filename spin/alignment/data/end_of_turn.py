"""Which token ids end a response: the template's end of turn, the EOS, and the ends that the model's files name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError


def model_end_ids(model: str | Path, revision: str | None = None) -> tuple[int, ...]:
    """Return the ids in ``eos_token_id`` of a model's ``generation_config.json``, ascending; empty without that file.

    Raises:
        InputError: the file is damaged, or the key is neither an id nor a list of ids.
    """
    path = _generation_config(str(model), revision)
    if path is None:
        return ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return end_ids_of(content.get("eos_token_id"))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as a generation config ({error}): correct its eos_token_id, or remove the file"
        ) from error


def _generation_config(model: str, revision: str | None) -> Path | None:
    if Path(model).is_dir():
        path = Path(model) / "generation_config.json"
        return path if path.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        model,
        "generation_config.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)


def end_ids_of(value: Any) -> tuple[int, ...]:
    """Return the ids of an ``eos_token_id`` (an id, a list or None), ascending.

    Raises:
        ValueError: it is something else.
    """
    ids = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
        raise ValueError(f"eos_token_id is {value!r}")
    return tuple(sorted(set(ids)))


def end_of_turn_id(after: Sequence[int], control: Iterable[int], ends: Iterable[int], eos_id: int | None) -> int | None:
    """Return the id that ends a turn, given the ids that a template writes ``after`` a response; None if nothing can.

    Only a ``control`` token can end a turn: a template that continues with plain text ends with the EOS. Of several control
    tokens in a row (Cohere closes a part of the response before the turn) it is the first that the model's files name among
    its ``ends``, failing that the first.
    """
    control, ends = set(control), {*ends} if eos_id is None else {*ends, eos_id}
    closing: list[int] = []
    for token in after:
        if token not in control:
            break
        closing.append(token)
    named = [token for token in closing if token in ends]
    return next(iter(named or closing), eos_id)
