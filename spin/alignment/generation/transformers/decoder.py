"""A batch of responses decoded together, one token per row and step; rows join and leave between steps."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

from spin.alignment.core.errors import NotFiniteError
from spin.alignment.generation.base import SamplingConfig
from spin.alignment.generation.transformers.decode_attention import RaggedRows, own_attention, supports_decode_attention
from spin.alignment.generation.transformers.jobs import Job
from spin.alignment.generation.transformers.kv_cache import RowCache
from spin.alignment.generation.transformers.packed_linear import PackedLinears
from spin.alignment.generation.transformers.sampling import NOT_FINITE, draw_tokens, penalise, token_logprobs
from spin.alignment.models.sharded import is_sharded

_Result = TypeVar("_Result")

# Tokens per prefill, padding included (more do not fit in a CPU's cache), and how many of them may be padding before another
# forward pass is cheaper.
_PREFILL_TOKENS = {"cuda": 16_384, "cpu": 2048}
_PREFILL_PADDING = {"cuda": 1024, "cpu": 128}


def without_gradients(model: Any) -> Callable[[], AbstractContextManager[Any]]:
    """Return the context to decode in. A sharded model gathers its weights into buffers that training uses next, which must not
    be inference tensors."""
    return torch.no_grad if is_sharded(model) else torch.inference_mode


def _without_gradients(method: Callable[..., _Result]) -> Callable[..., _Result]:
    """Run a method in the object's context ``without_gradients``."""

    @functools.wraps(method)
    def run(self: Any, *arguments: Any) -> _Result:
        with self.without_gradients():
            return method(self, *arguments)

    return run


class Decoder:
    """The running batch of one model: ``jobs[b]`` occupies row b of the cache."""

    def __init__(
        self,
        model: Any,
        windows: list[int | None],
        sampling: SamplingConfig,
        pad_id: int,
        most: int,
        ragged: bool,
        masked_ids: Sequence[int] = (),
        forward: Callable[..., Any] | None = None,
    ) -> None:
        """Start empty. ``most`` limits the number of rows; ``ragged`` is the result of :func:`takes_ragged_rows`; tokens of
        ``masked_ids`` are never drawn. ``forward`` runs the model (default: the model itself)."""
        self.model, self.windows, self.sampling, self.pad_id, self.most = model, windows, sampling, pad_id, most
        self._run = forward or model
        self.without_gradients = without_gradients(model)
        self._takes_ragged = ragged
        self.device: torch.device = model.device
        self._masked = torch.tensor(masked_ids, device=self.device) if masked_ids else None  # (M,)
        self.jobs: list[Job] = []
        self.cache = RowCache(windows)
        self._packed = PackedLinears(model)  # as of now: online training changes the weights before its next decoder
        # Logits of the last position only: those of a whole prefill would be (B, T, V).
        self._keep_one = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
        )
        self._tokens = torch.zeros(0, 1, dtype=torch.long, device=self.device)  # (B, 1): last token of each row
        self._padding = torch.zeros(0, 1, dtype=torch.long, device=self.device)  # (B, 1): padding columns of each row
        self._padded = False
        self._ragged: RaggedRows | None = None
        self._seen: Tensor | None = None  # (B, V), only with a repetition penalty

    @_without_gradients
    def add(self, jobs: Sequence[Job]) -> list[Job]:
        """Prefill jobs and add them to the batch; return those that ended with their first token."""
        ended = []
        # New samples of one request share a prefill; a job that was evicted has a response of its own to prefill.
        distinct = [
            list(same) for _, same in groupby(jobs, key=lambda job: (id(job.request), len(job.ids) and id(job)))
        ]
        kind = "cpu" if self.device.type == "cpu" else "cuda"
        for group in _prefill_groups(distinct, _PREFILL_PADDING[kind], _PREFILL_TOKENS[kind]):
            ended += self._prefill(group)
        self._settle()
        return ended

    @_without_gradients
    def step(self) -> list[Job]:
        """Sample a token for every row; return the jobs that ended, which have left the batch."""
        width, mask = self.cache.width, None
        if self._ragged is not None:
            self._ragged.begin(width + 1)
        elif self._padded:
            mask = torch.arange(width + 1, device=self.device) >= self._padding  # (B, width + 1)
        logits = self._forward(self._tokens, mask, width - self._padding, self.cache, self._ragged)  # (B, V)
        self._tokens, alive = self._draw(logits, self.jobs, self._seen)
        if len(alive) == len(self.jobs):
            return []
        return self._leave(alive)

    @_without_gradients
    def evict(self) -> Job:
        """Remove the shortest response from the batch, to be resumed later."""
        least = min(range(len(self.jobs)), key=lambda row: len(self.jobs[row].ids))
        return self._leave([row for row in range(len(self.jobs)) if row != least])[0]

    def _prefill(self, group: list[list[Job]]) -> list[Job]:
        """Run the G prompts of a group through the model; ``group[g]`` are the jobs that share prompt g."""
        ids = [same[0].token_ids() for same in group]
        width = max(map(len, ids))
        # (G, T), padded on the left
        rows = torch.tensor([[self.pad_id] * (width - len(row)) + list(row) for row in ids], device=self.device)
        padding = torch.tensor([[width - len(row)] for row in ids], device=self.device)  # (G, 1)
        columns = torch.arange(width, device=self.device)  # (T,)
        mask = columns >= padding if any(len(row) < width for row in ids) else None  # (G, T)
        cache = RowCache(self.windows)
        logits = self._forward(rows, mask, (columns - padding).clamp_(min=0), cache)  # (G, V)
        jobs = [job for same in group for job in same]
        # The prompt of each job; from here on there is one row per job.
        sources = [row for row, same in enumerate(group) for _ in same]
        seen = self._seen_tokens(jobs, logits.shape[1]) if self.sampling.repetition_penalty != 1.0 else None
        if len(jobs) > len(group):
            logits = logits[torch.tensor(sources, device=self.device)]  # (jobs, V)
        tokens, alive = self._draw(logits, jobs, seen)  # (jobs, 1)
        if alive:
            index = torch.tensor(alive, device=self.device)
            self.cache.join(cache, [sources[row] for row in alive], self.most)
            self.jobs += [jobs[row] for row in alive]
            self._tokens = torch.cat([self._tokens, tokens[index]])
            if seen is not None:
                self._seen = seen[index] if self._seen is None else torch.cat([self._seen, seen[index]])
        kept = set(alive)
        return [job for row, job in enumerate(jobs) if row not in kept]

    def _forward(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: RowCache, ragged: RaggedRows | None = None
    ) -> Tensor:
        """Return the logits after the last token of each row of ``ids`` ``(B, T)``, shape ``(B, V)``."""
        rows = {} if ragged is None else {"ragged_rows": ragged}
        with own_attention(self.model), self._packed.applied():
            output = self._run(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **self._keep_one,
                **rows,
            )
        return output.logits[:, -1]  # (B, V)

    def _draw(self, logits: Tensor, jobs: Sequence[Job], seen: Tensor | None) -> tuple[Tensor, list[int]]:
        """Sample a token for each job from logits ``(B, V)``; return the tokens, ``(B, 1)``, and the rows that continue."""
        penalised = logits if seen is None else penalise(logits.float(), seen, self.sampling.repetition_penalty)
        if self._masked is not None:
            # A copy: the log-probs of sampled tokens are those of the whole vocabulary, as in training.
            penalised = penalised.index_fill(1, self._masked, -torch.inf)  # (B, V)
        uniforms = None
        if self.sampling.temperature:
            uniforms = torch.tensor([job.next_number() for job in jobs], dtype=torch.float64).to(self.device)
        drawn = draw_tokens(penalised, uniforms, self.sampling)  # (B,)
        logprobs: list[float | None] = [None] * len(jobs)
        if self.sampling.logprobs:
            # One transfer to the host for both; every id is exact in float64.
            both = torch.stack([drawn.double(), token_logprobs(logits, drawn).double()]).tolist()
            tokens, logprobs = [int(token) for token in both[0]], both[1]
        else:
            tokens = drawn.tolist()
        if NOT_FINITE in tokens:
            prompt_id = jobs[tokens.index(NOT_FINITE)].request.prompt.prompt_id
            raise NotFiniteError(f"the logits of the model are not finite after prompt {prompt_id}: check its weights")
        drawn = drawn[:, None]
        if seen is not None:
            seen.scatter_(1, drawn, True)
        pairs = zip(jobs, tokens, logprobs, strict=True)
        return drawn, [row for row, (job, token, logprob) in enumerate(pairs) if not job.take(token, logprob)]

    def _seen_tokens(self, jobs: Sequence[Job], vocabulary: int) -> Tensor:
        """Return which tokens occur in each job's prompt and response, bool, shape ``(B, V)``."""
        seen = torch.zeros(len(jobs), vocabulary, dtype=torch.bool)
        for row, job in enumerate(jobs):
            seen[row, torch.tensor(job.token_ids())] = True
        return seen.to(self.device)

    def _leave(self, alive: list[int]) -> list[Job]:
        """Keep the rows that continue; return the jobs of the others."""
        kept = set(alive)
        left = [job for row, job in enumerate(self.jobs) if row not in kept]
        order = self.cache.keep(alive)
        index = torch.tensor(order, dtype=torch.long, device=self.device)
        self.jobs = [self.jobs[row] for row in order]
        self._tokens = self._tokens[index]
        self._seen = None if self._seen is None else self._seen[index]
        self._settle()
        return left

    def _settle(self) -> None:
        """After rows joined or left: drop columns that are padding in all rows, and recompute each row's padding."""
        if not self.jobs:
            return
        lengths = [job.length - 1 for job in self.jobs]  # the last token is not in the cache yet
        longest = max(lengths)
        self.cache.trim(self.cache.width - longest)
        padding = [longest - length for length in lengths]
        self._padding = torch.tensor(padding, device=self.device)[:, None]  # (B, 1)
        self._padded = any(padding)
        if self._takes_ragged:
            self._ragged = RaggedRows(padding, self.device, self.cache.column_bytes)


def takes_ragged_rows(model: Any, windows: list[int | None], forward: Callable[..., Any]) -> bool:
    """Return whether all layers of a model pass ``ragged_rows`` on to their attention; otherwise the library masks rows.

    ``forward`` runs the model.
    """
    if not supports_decode_attention(model):
        return False
    rows, token = RaggedRows([0], model.device, 1), torch.zeros(1, 1, dtype=torch.long, device=model.device)
    rows.begin(1)
    given = {
        "input_ids": token,
        "attention_mask": token + 1,
        "position_ids": token,
        "past_key_values": RowCache(windows),
    }
    try:
        with own_attention(model):
            forward(**given, use_cache=True, ragged_rows=rows)
    except TypeError:  # its forward accepts no further keyword arguments
        return False
    return rows.uses == len(windows)


def _prefill_groups(prompts: list[list[Job]], padding: int, tokens: int) -> list[list[list[Job]]]:
    """Sort prompts by length, longest first, into groups with at most ``padding`` padding and ``tokens`` total tokens."""
    groups: list[list[list[Job]]] = []
    wasted = width = 0
    for same in sorted(prompts, key=lambda same: -same[0].length):
        length = same[0].length
        wasted += width - length
        if not groups or wasted > padding or (len(groups[-1]) + 1) * width > tokens:
            groups.append([])
            wasted, width = 0, length
        groups[-1].append(same)
    return groups
