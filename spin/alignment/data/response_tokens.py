"""The number of tokens in a file of responses."""

from __future__ import annotations

from pathlib import Path

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import open_parquet, read_batches


def response_tokens(path: Path) -> int:
    """Return the number of tokens of the responses in a file of generate.py or evaluate_model.py; 0 if it was removed."""
    if not path.exists():
        return 0
    names = open_parquet(path).schema_arrow.names
    column = next((name for name in ("rejected_token_ids", "token_ids") if name in names), None)
    if column is None:
        raise InputError(f"{path} has no token ids: it is not a file of responses, so run its stage again")
    return sum(
        batch.column(column).value_lengths().sum().as_py() or 0 for batch in read_batches(path, columns=[column])
    )
