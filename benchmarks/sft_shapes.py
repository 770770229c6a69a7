"""Rows of SFT with the lengths of instruction data, and the number of operations they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.shapes import EOS_ID, FIRST_WORD_ID, MEGA_BATCH, VERIFY_TOKENS, ModelSize

Row = dict[str, list[int]]  # prompt_ids, response_ids; responses end with EOS

# Lengths of an instruction data set of 1,000 rows (Alpaca, answers of a stronger model) in SmolLM2's tokens: the median prompt
# with its template, the standard deviation of its logarithm, and the deciles of the response, from the shortest to the longest.
# Shuffled batches of 8 such rows have 2.2 padded tokens per distinct one.
PROMPT, PROMPT_SPREAD = 45, 0.22
RESPONSE_DECILES = (2, 12, 20, 34, 65, 107, 161, 218, 291, 363, 595)
MAX_LENGTH = 1024


@dataclass(frozen=True)
class SFTPlan:
    """The rows of a run, batch by batch: as shuffling forms batches, and as transformers' LengthGroupedSampler does.

    Both begin with the same ``head`` rows: the short batch that is verified, twice, and the warm-up batches.
    """

    shuffled: list[Row]
    grouped: list[Row]
    head: int

    def rows(self, grouped: bool) -> list[Row]:
        return self.grouped if grouped else self.shuffled


def draw_lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return lengths of prompt and response in tokens, int64 of shape ``(count, 2)``."""
    prompts = np.exp(np.log(PROMPT) + PROMPT_SPREAD * rng.standard_normal(count)).clip(8, 200)
    responses = np.interp(rng.random(count), np.linspace(0, 1, len(RESPONSE_DECILES)), RESPONSE_DECILES).clip(2)
    return np.stack([prompts, responses], axis=1).astype(np.int64)


def make_rows(lengths: np.ndarray, vocab_size: int, rng: np.random.Generator) -> list[Row]:
    """Return rows of random ids with these lengths; responses end with EOS, which their length counts."""

    def words(length: int) -> list[int]:
        return rng.integers(FIRST_WORD_ID, vocab_size, length).tolist()

    return [
        {"prompt_ids": words(prompt), "response_ids": [*words(response - 1), EOS_ID]}
        for prompt, response in lengths.tolist()
    ]


def make_sft_plan(batch_size: int, warmup: int, measured: int, vocab_size: int, seed: int) -> SFTPlan:
    """Return the rows of ``warmup`` and ``measured`` batches of both kinds; see :func:`benchmarks.shapes.make_plan`."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    rng = np.random.default_rng(seed)
    first = [rng.integers(8, VERIFY_TOKENS + 1, (batch_size, 2)), draw_lengths(warmup * batch_size, rng)]
    head = make_rows(np.concatenate(first), vocab_size, rng)
    shuffled = make_rows(draw_lengths(measured * batch_size, rng), vocab_size, rng)
    pool = draw_lengths(MEGA_BATCH * -(-measured // MEGA_BATCH) * batch_size, rng)
    generator = torch.Generator().manual_seed(seed)
    lengths = pool.sum(axis=1).tolist()
    indices = get_length_grouped_indices(lengths, batch_size, mega_batch_mult=MEGA_BATCH, generator=generator)
    batches = np.array(indices).reshape(-1, batch_size)
    batches = batches[((np.arange(measured) + 0.5) / measured * len(batches)).astype(int)]
    grouped = make_rows(pool[rng.permutation(batches).ravel()], vocab_size, rng)
    head = head[:batch_size] + head
    return SFTPlan(head + shuffled, head + grouped, len(head))


def padded_to_distinct(tokens: Sequence[int], batch_size: int) -> float:
    """Return the size of padded batches of consecutive rows of these lengths, relative to their tokens."""
    batches = [tokens[begin : begin + batch_size] for begin in range(0, len(tokens), batch_size)]
    return sum(len(some) * max(some) for some in batches) / sum(tokens)


def flops_per_row(size: ModelSize, rows: Sequence[Row]) -> float:
    """Return the mean number of floating-point operations that a row needs, regardless of the method that trains on it.

    ``6 (N D + H T) + 3 A`` with N trunk and H head weights, D tokens, T of them in the response, and the forward pass of causal
    attention A: 4 operations per layer, query, key and unit of width.
    """
    found = []
    for row in rows:
        targets = len(row["response_ids"])
        tokens = len(row["prompt_ids"]) + targets
        attention = 4 * size.layers * size.attention_width * tokens * (tokens + 1) / 2
        found.append(6 * (size.trunk * tokens + size.head * targets) + 3 * attention)
    return sum(found) / len(found)
