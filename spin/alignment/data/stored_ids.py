"""Token ids that came with preference rows: which tokenizer and template they are from, and whether they decode to their text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import open_parquet
from spin.alignment.core.provenance import METADATA_KEY, Provenance, read_provenance
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.data.conversation_text import SYSTEM_POLICIES
from spin.alignment.data.source_files import split_files
from spin.alignment.data.source_names import is_local
from spin.alignment.data.split_names import preference_split

# Parts of a turn besides its content that a template renders, so that the ids decode to more than the content.
_STRUCTURED = ("reasoning_content", "tool_calls")


def check_origin(path: str | Path, split: str, encoder: ChatEncoder, fix: str = "") -> None:
    """Check that the pairs of a split were sampled with an encoder's tokenizer, chat template and treatment of system turns.

    Files without a record of them (from elsewhere, or of pairs that were never sampled) are accepted: their ids are compared with
    their text row by row (:func:`ids_problem`).

    Args:
        fix: a further way out for the message, such as a setting.

    Raises:
        InputError: they were sampled with others; the message says what differs.
    """
    for file in split_files(path, preference_split(split)) if is_local(path) else ():
        if file.suffix != ".parquet":
            continue
        schema = open_parquet(file).schema_arrow
        if METADATA_KEY in (schema.metadata or {}) and (what := _difference(read_provenance(schema, file), encoder)):
            raise InputError(
                f"the pairs in {file} were sampled with {what}: train the model that sampled them, with the same settings{fix}"
            )


def _difference(made: Provenance, encoder: ChatEncoder) -> str:
    """Return what the pairs were sampled with that differs from the encoder; empty if nothing does."""
    if made.tokenizer_hash and made.tokenizer_hash != encoder.tokenizer_hash:
        return f"another tokenizer ({made.tokenizer_hash}) than that of {encoder.name} ({encoder.tokenizer_hash})"
    if not made.chat_template_hash or made.chat_template_hash == encoder.template_hash:
        return ""
    for name in ("chat_template_kwargs", "template_date"):
        theirs, ours = made.sampling.get(name), encoder.template_record.get(name)
        if theirs != ours:
            return f"{name} {theirs}, but {name} is {ours} here"
    for system in SYSTEM_POLICIES:
        other = ChatEncoder(
            encoder.tokenizer,
            system,
            chat_template_kwargs=encoder.template.arguments,
            date=encoder.template.date,
            end_ids=encoder.stop_ids,
        )
        if system != encoder.system and other.template_hash == made.chat_template_hash:
            return f"system: {system}, but system is {encoder.system} here"
    return f"another chat template ({made.chat_template_hash}), than that of {encoder.name} ({encoder.template_hash})"


def ids_problem(row: Mapping[str, Any], response: str, encoder: ChatEncoder) -> str | None:
    """Return why the stored ids of a response are not the text of its turn; None if they are, or if there are none.

    The text may lack whitespace at its ends, and what follows from a stop text on.
    """
    ids = row.get(f"{response}_token_ids")
    if not ids:
        return None
    problem = f"{response}_token_ids do not decode to the text of the {response} response"
    if min(ids) < 0:
        return problem
    turn = row[response][-1]
    text = turn["content"]
    # Texts from elsewhere may lack the thought that the generation prompt opens.
    readings = encoder.readings(ids, row.get("chat_template_kwargs"))
    if text.strip() in [reading.strip() for reading in readings]:
        return None
    if any(turn.get(name) for name in _STRUCTURED) and any(text.strip() in reading for reading in readings):
        return None
    by_stop_text = row.get(f"{response}_finish_reason") == "stop" and ids[-1] not in encoder.stop_ids
    return None if by_stop_text and any(reading.startswith(text) for reading in readings) else problem
