"""One fraction being generated: its encoded prompts, the journal of its finished rows, and the blocks that workers claim."""

from __future__ import annotations

import copy
import math
import sys
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spin.alignment.core.errors import InputError, NotFiniteError
from spin.alignment.data.chat_encoder import RowRefused, template_arguments
from spin.alignment.data.fractions import fraction_path, fraction_rows
from spin.alignment.data.prompt_store import PromptStore, ids_sum
from spin.alignment.data.turns import prompt_turns
from spin.alignment.generation.base import PromptRequest, Response, SamplingConfig
from spin.alignment.generation.config import GenerateConfig
from spin.alignment.generation.fraction_journal import FractionJournal
from spin.alignment.generation.leases import Leases, Worker
from spin.alignment.generation.response_rows import response_table
from spin.alignment.models.vocabulary import check_ids, vocabulary_size

if TYPE_CHECKING:
    import pyarrow as pa

    from spin.alignment.core.provenance import Provenance
    from spin.alignment.data.chat_encoder import ChatEncoder

# Workers claim blocks of prompts: small enough that no worker is idle for long at the end, large enough that claims are cheap.
_BLOCKS_PER_FRACTION = 64
_LARGEST_BLOCK = 256
_ENCODED_AT_ONCE = 1024  # prompts


@dataclass(frozen=True)
class EncodedPrompts:
    """The prompts of a fraction that fit, longest first, and those that are skipped."""

    requests: list[PromptRequest]
    rows: list[int]
    skipped: list[dict[str, str]]


@dataclass(frozen=True)
class GenerationJob:
    """What all fractions of a data set have in common.

    Attributes:
        longest_prompt: prompts with more tokens are skipped.
        context: number of tokens the model can attend to; None without a limit.
        model_config: the model's configuration.
        provenance: that of every fraction, except for ``data_frac`` and the sum of the fraction's ids.
        overwrite: whether existing fractions with other provenance may be replaced.
        lease_timeout: seconds without a heartbeat after which a worker counts as dead.
    """

    store: PromptStore
    encoder: ChatEncoder
    sampling: SamplingConfig
    schema: pa.Schema
    output_dir: Path
    split: str
    frac_len: int
    longest_prompt: int
    context: int | None
    model_config: Any
    provenance: Provenance
    lease_timeout: float
    overwrite: bool = False

    def for_another_thread(self) -> GenerationJob:
        """Return this job with a copy of its encoder, because tokenizers are not thread-safe."""
        return replace(self, encoder=copy.deepcopy(self.encoder))

    def encode(self, number: int) -> EncodedPrompts:
        """Encode the prompts of a fraction.

        Raises:
            InputError: the template rejects a prompt; the error names it.
        """
        rows = fraction_rows(len(self.store), number, self.frac_len)
        found: list[PromptRequest | tuple[str, str]] = [("", "")] * len(rows)
        # In the order of the store, whose rows are read fastest one after the other.
        order = np.argsort(rows, kind="stable").tolist()
        for begin in range(0, len(order), _ENCODED_AT_ONCE):
            places = order[begin : begin + _ENCODED_AT_ONCE]
            requests = self._requests(self.store.rows([rows[place] for place in places]))
            for place, request in zip(places, requests, strict=True):
                found[place] = request
        kept = [
            (index, request) for index, request in zip(rows, found, strict=True) if isinstance(request, PromptRequest)
        ]
        skipped = [
            dict(zip(("prompt_id", "reason"), item, strict=True))
            for item in found
            if not isinstance(item, PromptRequest)
        ]
        # Long prompts first, so that the tail, when no more prompts can fill the engine, consists of short ones.
        kept.sort(key=lambda item: -len(item[1].token_ids))
        return EncodedPrompts([request for _, request in kept], [index for index, _ in kept], skipped)

    def _requests(self, rows: Sequence[dict[str, Any]]) -> Iterator[PromptRequest | tuple[str, str]]:
        """Yield the request of each prompt, or its id and the reason to skip it."""
        size = vocabulary_size(self.model_config)
        prompts = [(prompt_turns(row["chosen"]), template_arguments(row)) for row in rows]
        for row, ids in zip(rows, self.encoder.ids_of_prompts(prompts), strict=True):
            prompt_id = row["prompt_id"]
            if isinstance(ids, RowRefused):
                yield prompt_id, str(ids)
                continue
            if isinstance(ids, InputError):
                raise InputError(f"prompt {prompt_id}: {ids}") from ids
            if size is not None and max(ids, default=0) >= size:
                check_ids(ids, self.model_config, self.encoder.name, f"prompt {prompt_id}: the prompt")
            if len(ids) > self.longest_prompt:
                yield prompt_id, f"prompt of {len(ids)} tokens, at most {self.longest_prompt} fit"
                continue
            # An array of C ints: a list of Python ints would take several times the memory for a whole fraction.
            free_tokens = None if self.context is None else self.context - len(ids)
            yield PromptRequest(prompt_id, array("i", ids), free_tokens)

    def fraction_provenance(self, number: int, prompts: EncodedPrompts) -> Provenance:
        """Return the provenance of one fraction, with the sum of its prompt ids as proof that none is missing or repeated."""
        ids = [request.prompt_id for request in prompts.requests] + [item["prompt_id"] for item in prompts.skipped]
        extra = self.provenance.extra | {"fraction_ids": ids_sum(iter(ids)), "all_ids": self.store.all_ids}
        return replace(self.provenance, data_frac=number, extra=extra)

    def texts(self, indices: Sequence[int], samples: Sequence[Sequence[Response]]) -> list[str]:
        """Return the text of every response to the prompts at ``indices`` in the store, in order, without stop texts."""
        arguments: list[str | None] = [None] * len(indices)
        if "chat_template_kwargs" in self.store.features.columns:
            arguments = self.store.table(indices).column("chat_template_kwargs").to_pylist()
        ids = [response.token_ids for responses in samples for response in responses]
        carried = [text for text, responses in zip(arguments, samples, strict=True) for _ in responses]
        return [self._until_stop(text) for text in self.encoder.response_texts(ids, carried)]

    def _until_stop(self, text: str) -> str:
        ends = [place for stop in self.sampling.stop if (place := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text


def check_finite(prompt_id: str, responses: Sequence[Response]) -> None:
    """Check the log-probs of the responses to a prompt, of any backend.

    Raises:
        NotFiniteError: one is not finite.
    """
    if any(not math.isfinite(value) for response in responses for value in response.logprobs or ()):
        raise NotFiniteError(
            f"a log-prob of a response to prompt {prompt_id} is not finite: check the model's weights and its dtype"
        )


@dataclass(frozen=True)
class FinishedPrompts:
    """Prompts of a fraction by position, ascending, their responses, and the text of every response in this order."""

    positions: list[int]
    samples: list[list[Response]]
    texts: list[str]


class FractionWork:
    """One fraction from the point of view of one worker."""

    def __init__(self, job: GenerationJob, number: int, worker: Worker, prompts: EncodedPrompts | None = None) -> None:
        """Encode the fraction (unless that was done ahead), and see what is finished and claimed.

        Raises:
            InputError: the template rejects a prompt, or no prompt of the fraction fits.
        """
        self.job, self.number = job, number
        self.prompts = prompts or job.encode(number)
        if not self.prompts.requests:
            raise InputError(
                f"no prompt of fraction {number} fits ({self.prompts.skipped[0]['reason']}): raise max_prompt_length or "
                "lower max_new_tokens"
            )
        count = len(self.prompts.requests)
        path = fraction_path(job.output_dir, job.split, number)
        provenance = job.fraction_provenance(number, self.prompts)
        self.journal = FractionJournal(path, job.schema, provenance, count, job.sampling.num_samples)
        self.journal.open()
        # Checked only now: another worker may have merged it during encoding, and would not remove the folder just created.
        self.merged = self.journal.is_merged()
        if self.merged:
            self.journal.remove_parts()
        self.leases = Leases(self.journal.folder, worker, job.lease_timeout)
        self._block = max(1, min(_LARGEST_BLOCK, count // _BLOCKS_PER_FRACTION))
        self._candidates = deque(range(-(-count // self._block)))
        self._elsewhere: list[int] = []

    def claims(self) -> Iterator[list[int]]:
        """Claim one block after another; yield the unfinished positions in each."""
        while self._candidates and self.journal.accepts_parts():
            block = self._candidates.popleft()
            positions = range(block * self._block, min((block + 1) * self._block, len(self.journal.finished)))
            if self.journal.finished[positions].all():
                continue
            if not self.leases.claim(f"block-{block:06d}"):
                self._elsewhere.append(block)
                continue
            # A previous owner may have finished part of the block before it died.
            self.journal.scan()
            if pending := [position for position in positions if not self.journal.finished[position]]:
                yield pending

    def finish(self, responses: dict[int, list[Response]]) -> FinishedPrompts:
        """Decode the responses to some prompts, given by position."""
        positions = sorted(responses)
        samples = [responses[position] for position in positions]
        indices = [self.prompts.rows[position] for position in positions]
        return FinishedPrompts(positions, samples, self.job.texts(indices, samples))

    def write(self, worker: str, finished: FinishedPrompts) -> None:
        """Write the rows of finished prompts as one part; this needs no tokenizer, so any thread may do it.

        Raises:
            InputError: the disk is full, or the folder is read-only or has disappeared.
        """
        prompts = self.job.store.table([self.prompts.rows[position] for position in finished.positions])
        rows = response_table(prompts, finished.samples, finished.texts, self.job.schema)
        self.journal.write(worker, finished.positions, rows)

    def look_again(self) -> None:
        """See what others have finished, and try the blocks they hold again in case they have died."""
        self.journal.scan()
        self._candidates.extend(self._elsewhere)
        self._elsewhere = []

    def merge_if_complete(self) -> bool:
        """Merge the parts if every prompt is finished and no other worker does so; return whether this worker did.

        Raises:
            InputError: a fraction made from something else has come into its place.
        """
        if not self.journal.is_complete() or not self.leases.claim("merge"):
            return False
        if self.journal.is_merged():
            self.merged = True
            self.journal.remove_parts()
            return False
        if self.journal.path.exists() and not self.job.overwrite:
            raise InputError(
                f"{self.journal.path} was created by another run with different provenance: pass the same flags on every server, "
                "or another output_dir; what was generated here is kept"
            )
        self.journal.merge(self.prompts.skipped)
        self.merged = True
        return True


def longest_prompt(config: GenerateConfig, context: int | None) -> int:
    """Return the longest prompt allowed by ``max_prompt_length`` and the model's context, in tokens.

    Raises:
        InputError: ``max_new_tokens`` does not fit in the context after any prompt, or nothing limits a response.
    """
    if context is None:
        if not config.max_new_tokens:
            raise InputError("max_new_tokens is 0, but the model's context has no limit: set max_new_tokens")
        return config.max_prompt_length or sys.maxsize
    if context <= config.max_new_tokens:
        raise InputError(
            f"max_new_tokens {config.max_new_tokens} leaves no tokens for a prompt in the context of {context} tokens: "
            "lower it"
        )
    return min(config.max_prompt_length or sys.maxsize, context - max(config.max_new_tokens, 1))
