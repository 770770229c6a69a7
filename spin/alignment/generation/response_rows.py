"""The rows of responses, built column by column: rows of Python values would take ten times as long to become a table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spin.alignment.generation.base import Response


def response_table(
    prompts: pa.Table, samples: Sequence[Sequence[Response]], texts: Sequence[str], schema: pa.Schema
) -> pa.Table:
    """Return one row per response; those of a prompt stand together.

    ``chosen`` is the prompt with its ground truth, null without one; ``rejected`` is the prompt with the response.

    Args:
        prompts: rows of :meth:`PromptStore.table`.
        samples: the responses to each prompt, equally many.
        texts: the text of every response, in order.
        schema: the columns of the result, a subset of those of a generated row.
    """
    responses = list(chain.from_iterable(samples))
    count = len(responses) // max(len(samples), 1)
    row_of = np.repeat(np.arange(len(samples)), count)  # the prompt of each response
    kind = schema.field("rejected").type
    conversations = _with_fields(prompts.column("chosen").combine_chunks(), kind)
    starts, ends = (conversations.offsets.to_numpy()[cut] for cut in (slice(None, -1), slice(1, None)))
    last = conversations.values.field("role").take(pa.array(ends - 1))
    has_ground_truth = pc.equal(last, "assistant").to_numpy(zero_copy_only=False)
    columns = {
        "sample_index": np.tile(np.arange(count, dtype=np.int32), len(samples)),
        "chosen": conversations.take(pa.array(row_of, mask=~has_ground_truth[row_of])),
        "rejected": _answered(conversations, starts[row_of], (ends - has_ground_truth)[row_of], texts),
        "rejected_token_ids": [response.token_ids for response in responses],
        "rejected_finish_reason": [response.finish_reason for response in responses],
        "rejected_logprobs": [response.logprobs for response in responses],
    }
    repeated = pa.array(row_of)
    arrays = [
        _array(columns[field.name], field.type)
        if field.name in columns
        else prompts.column(field.name).combine_chunks().take(repeated)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(values: object, kind: pa.DataType) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values, kind)


def _with_fields(conversations: pa.ListArray, kind: pa.DataType) -> pa.ListArray:
    """Return conversations with the fields of turns that ``kind`` has; the prompt store has all of them."""
    turns, fields = conversations.values, list(kind.value_type)
    kept = pa.StructArray.from_arrays([turns.field(field.name) for field in fields], fields=fields)
    return pa.ListArray.from_arrays(conversations.offsets, kept, type=kind)


def _answered(conversations: pa.ListArray, starts: np.ndarray, ends: np.ndarray, texts: Sequence[str]) -> pa.ListArray:
    """Return for each text the turns from its start to its end, and a turn of the assistant with the text."""
    turns = conversations.values
    said = {"role": pa.array(["assistant"] * len(texts)), "content": pa.array(texts, pa.string())}
    fields = list(turns.type)
    answers = pa.StructArray.from_arrays(
        [said.get(field.name, pa.nulls(len(texts), field.type)) for field in fields], fields=fields
    )
    lengths = ends - starts + 1
    offsets = np.concatenate([[0], lengths.cumsum()])
    # Turn number n of a row is number start + n of all turns; the last is its answer, behind all of them.
    places = np.arange(offsets[-1]) + (starts - offsets[:-1]).repeat(lengths)
    places[offsets[1:] - 1] = len(turns) + np.arange(len(texts))
    taken = pa.concat_arrays([turns, answers]).take(pa.array(places))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), taken, type=conversations.type)
