"""One fraction being generated: its encoded prompts, the journal of its finished rows, and the blocks that workers claim."""

from __future__ import annotations

import copy
import math
import sys
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError, NotFiniteError
from spin.alignment.data.chat_encoder import RowRefused, template_arguments
from spin.alignment.data.fractions import fraction_path, fraction_rows
from spin.alignment.data.prompt_store import PromptStore, ids_sum
from spin.alignment.data.rows import carried_columns
from spin.alignment.data.turns import prompt_turns
from spin.alignment.generation.base import PromptRequest, Response, SamplingConfig
from spin.alignment.generation.config import GenerateConfig
from spin.alignment.generation.fraction_journal import FractionJournal
from spin.alignment.generation.leases import Leases, Worker
from spin.alignment.models.vocabulary import check_ids

if TYPE_CHECKING:
    import pyarrow as pa

    from spin.alignment.core.provenance import Provenance
    from spin.alignment.data.chat_encoder import ChatEncoder

# Workers claim blocks of prompts: small enough that no worker is idle for long at the end, large enough that claims are cheap.
_BLOCKS_PER_FRACTION = 64
_LARGEST_BLOCK = 64


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
        kept: list[tuple[int, PromptRequest]] = []
        skipped = []
        for index in fraction_rows(len(self.store), number, self.frac_len):
            row = self.store.row(index)
            request = self._request(row)
            if isinstance(request, str):
                skipped.append({"prompt_id": row["prompt_id"], "reason": request})
            else:
                kept.append((index, request))
        # Long prompts first, so that the tail, when no more prompts can fill the engine, consists of short ones.
        kept.sort(key=lambda item: -len(item[1].token_ids))
        return EncodedPrompts([request for _, request in kept], [index for index, _ in kept], skipped)

    def _request(self, row: dict[str, Any]) -> PromptRequest | str:
        prompt = prompt_turns(row["chosen"])
        try:
            ids = self.encoder.prompt_ids(prompt, **template_arguments(row))
            check_ids(ids, self.model_config, self.encoder.name, "the prompt")
        except RowRefused as refused:
            return str(refused)
        except InputError as error:
            raise InputError(f"prompt {row['prompt_id']}: {error}") from error
        if len(ids) > self.longest_prompt:
            return f"prompt of {len(ids)} tokens, at most {self.longest_prompt} fit"
        # An array of C ints: a list of Python ints would take several times the memory for a whole fraction.
        free_tokens = None if self.context is None else self.context - len(ids)
        return PromptRequest(row["prompt_id"], array("i", ids), free_tokens)

    def fraction_provenance(self, number: int, prompts: EncodedPrompts) -> Provenance:
        """Return the provenance of one fraction, with the sum of its prompt ids as proof that none is missing or repeated."""
        ids = [request.prompt_id for request in prompts.requests] + [item["prompt_id"] for item in prompts.skipped]
        extra = self.provenance.extra | {"fraction_ids": ids_sum(iter(ids)), "all_ids": self.store.all_ids}
        return replace(self.provenance, data_frac=number, extra=extra)

    def rows(self, index: int, responses: list[Response]) -> list[dict[str, Any]]:
        """Return the generated rows of the prompt at ``index`` in the store; ``chosen`` is null without a ground truth.

        Raises:
            NotFiniteError: a log-prob is not finite, in any backend.
        """
        row = self.store.row(index)
        prompt = prompt_turns(row["chosen"])
        ground_truth = row["chosen"] if len(prompt) < len(row["chosen"]) else None
        if any(not math.isfinite(value) for response in responses for value in response.logprobs or ()):
            raise NotFiniteError(
                f"a log-prob of a response to prompt {row['prompt_id']} is not finite: check the model's weights and its dtype"
            )
        return [
            {
                "prompt_id": row["prompt_id"],
                "sample_index": sample,
                "chosen": ground_truth,
                "rejected": [
                    *prompt,
                    {"role": "assistant", "content": self._text(response, row.get("chat_template_kwargs"))},
                ],
                "rejected_token_ids": response.token_ids,
                "rejected_finish_reason": response.finish_reason,
                **({"rejected_logprobs": response.logprobs} if self.sampling.logprobs else {}),
                **carried_columns(row),
            }
            for sample, response in enumerate(responses)
        ]

    def _text(self, response: Response, row_arguments: str | None) -> str:
        text = self.encoder.response_text(response.token_ids, row_arguments)
        ends = [place for stop in self.sampling.stop if (place := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text


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
