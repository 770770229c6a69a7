"""A table of each step's responses beside the checkpoints, of bounded size: what a person who steers a training reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

FOLDER = "responses"
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("response", pa.string()),
        ("score", pa.float64()),
        ("chosen", pa.bool_()),
        ("rejected", pa.bool_()),
        ("tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("logp_per_token", pa.float64()),
        ("weights_version", pa.string()),
    ]
)


def response_rows(
    rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]], logps: Sequence[Sequence[float] | None]
) -> list[dict[str, Any]]:
    """Return the rows of the table for the responses to one prompt, without their step.

    Args:
        rows: the labelled rows of the prompt, as generated (the response is the rejected side).
        pairs: the pairs made of them.
        logps: the sampler's log-probs of each response's tokens (nats), if known.
    """
    chosen = [pair.get("chosen_token_ids") for pair in pairs]
    rejected = [pair["rejected_token_ids"] for pair in pairs]
    return [
        {
            "prompt_id": row["prompt_id"],
            "sample_index": row["sample_index"],
            "prompt": [{name: turn.get(name) or "" for name in ("role", "content")} for turn in row["rejected"][:-1]],
            "response": row["rejected"][-1]["content"],
            "score": row.get("rejected_score"),
            "chosen": row["rejected_token_ids"] in chosen,
            "rejected": row["rejected_token_ids"] in rejected,
            "tokens": len(row["rejected_token_ids"]),
            "finish_reason": row["rejected_finish_reason"],
            "logp_per_token": sum(own) / len(own) if own else None,
            "weights_version": row.get("weights_version"),
        }
        for row, own in zip(rows, logps, strict=True)
    ]


def keep_responses(output_dir: Path, step: int, rows: Sequence[dict[str, Any]], most_steps: int) -> None:
    """Write the responses of a step to ``responses/step-NNNNNN.parquet``, and remove the tables of the oldest steps beyond
    ``most_steps``. A step that is repeated after a resume replaces its table.

    Raises:
        InputError: the folder is not writable, or the disk is full.
    """
    import pyarrow.parquet as pq

    from spin.alignment.core.files import atomic_file, remove_all_leftovers, remove_files

    if not rows:
        return
    folder = output_dir / FOLDER
    with atomic_file(folder / f"step-{step:06d}.parquet") as file:
        pq.write_table(pa.Table.from_pylist([{"step": step, **row} for row in rows], SCHEMA), file)
    remove_all_leftovers(folder)
    tables = sorted(folder.glob("step-*.parquet"), key=lambda path: int(path.stem.removeprefix("step-")))
    remove_files(tables[: max(0, len(tables) - most_steps)])
