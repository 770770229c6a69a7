"""The batch of responses that is sampled while the policy is trained on the batch before it (``async_steps: 1``)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate.utils import gather_object

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import atomic_file
from spin.alignment.generation.base import PromptRequest, Response, SamplingConfig
from spin.alignment.training.online.policy_sampler import OverlappingSampler, Rows

logger = logging.getLogger(__name__)

PENDING_FILE = "pending_responses.parquet"
_LAG = b"lag"
_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("logprobs", pa.list_(pa.float64())),
        ("weights_version", pa.string()),
    ]
)

_Key = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class SampledAhead:
    """A batch of responses, and the number of optimiser steps that were taken since its weights sampled it."""

    rows: Rows
    lag: int


class BatchAhead:
    """At most one batch: under way, complete, or none. Every process must call every method, for its own prompts.

    A checkpoint contains the batch itself, so that a resumed run trains on the same responses and needs no older weights to
    sample them again.
    """

    def __init__(self, sampler: OverlappingSampler) -> None:
        self._sampler = sampler
        self._asked: list[_Key] | None = None  # of the batch under way
        self._complete: dict[_Key, list[Response]] | None = None
        self._lag = 0

    def start(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> None:
        """Begin to sample a batch with the weights that the sampler has."""
        self._complete, self._lag = None, 0
        self._asked = [_key(request) for request in requests]
        self._sampler.start(requests, sampling)

    def count_updates(self, updates: int) -> None:
        """Note that the policy was updated after the batch was begun."""
        self._lag += updates

    def land(self) -> None:
        """Wait until no batch is under way, so that the sampler can get other weights or prompts.

        Whatever was raised while it was sampled is raised here.
        """
        if self._asked is None:
            return
        asked, self._asked = self._asked, None
        rows = self._sampler.finish()
        self._complete = None if rows is None else dict(zip(asked, rows, strict=True))
        if rows is None:
            logger.warning(
                "the weights of the batch under way were lost: it is sampled again, with the present weights"
            )

    def take(self, requests: Sequence[PromptRequest]) -> SampledAhead | None:
        """Return the batch, if it was sampled for these prompts; None if it has to be sampled now."""
        self.land()
        complete, self._complete = self._complete, None
        found = [None if complete is None else complete.get(_key(request)) for request in requests]
        if complete is None or not all(gather_object([None not in found])):
            return None
        return SampledAhead([row for row in found if row is not None], self._lag)

    def drop(self) -> None:
        """Forget the batch, once it is no longer under way and whatever came of it."""
        self._asked = self._complete = None
        self._sampler.forget()

    def save(self, checkpoint: Path, is_main: bool) -> None:
        """Write the batch to a checkpoint: the responses of all processes, no row if there is none."""
        import pyarrow.parquet as pq

        self.land()
        rows = dict(gather_object(list((self._complete or {}).items())))
        if is_main:
            records = [record for key, row in rows.items() for record in _records(key, row)]
            schema = _SCHEMA.with_metadata({_LAG: json.dumps(self._lag).encode()})
            with atomic_file(checkpoint / PENDING_FILE) as file:
                pq.write_table(pa.Table.from_pylist(records, schema), file, compression="zstd")

    def load(self, checkpoint: Path) -> None:
        """Read the batch of the checkpoint that a run resumes from: the responses of all processes.

        Raises:
            InputError: the checkpoint has no such file.
        """
        import pyarrow.parquet as pq

        path = checkpoint / PENDING_FILE
        if not path.exists():
            raise InputError(
                f"{path} is missing, so the run cannot resume exactly: restore it, or remove the checkpoint {checkpoint}"
            )
        table = pq.read_table(path)
        self._lag = int(json.loads(table.schema.metadata[_LAG]))
        self._complete = {} if len(table) else None
        for record in table.to_pylist():
            key = (record.pop("prompt_id"), tuple(record.pop("prompt_token_ids")))
            assert self._complete is not None
            self._complete.setdefault(key, []).append(Response(**record))


def _key(request: PromptRequest) -> _Key:
    return request.prompt_id, tuple(request.token_ids)


def _records(key: _Key, row: Sequence[Response]) -> list[dict[str, Any]]:
    prompt_id, prompt_token_ids = key
    return [{"prompt_id": prompt_id, "prompt_token_ids": prompt_token_ids, **vars(response)} for response in row]
