"""Sampling one token per row from logits by inverse CDF, without a float64 pass over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from spin.alignment.generation.base import SamplingConfig

# Tokens per block of the vocabulary: first a block is drawn, then a token in it.
_BLOCK = 256
# The edge of a nucleus is first searched for among this many of the largest weights.
_CANDIDATES = 256
# The 31 bits of a positive float32, divided into the digits of a radix search for the edge of a nucleus.
_HISTOGRAM_BITS = (12, 12, 7)
# float32 numbers that stay in the cache of a CPU core (2 MiB).
_CACHED_NUMBERS = 2**19
NOT_FINITE = -1  # returned instead of a token id


def draw_tokens(logits: Tensor, uniforms: Tensor | None, sampling: SamplingConfig) -> Tensor:
    """Return one token per row, shape ``(B,)``; ``NOT_FINITE`` where the largest logit is NaN or infinite.

    Temperature is applied first, then min_p, top_k and top_p, each to the tokens that the previous one kept (vLLM's order).
    Tokens as likely as the last one kept are kept too, so that ties are not broken arbitrarily. The result is the first token
    whose cumulative probability, in the order of the vocabulary, exceeds the row's random number.

    Args:
        logits: shape ``(B, V)``, in any precision: the arithmetic is in float32.
        uniforms: random numbers in [0, 1), shape ``(B,)``, float64; not used at temperature 0.
    """
    highest = logits.amax(dim=-1, keepdim=True)  # (B, 1); NaN if any logit of the row is
    if sampling.temperature == 0.0:
        drawn = logits.argmax(dim=-1)
    else:
        assert uniforms is not None
        rows, vocabulary = logits.shape
        at_once = _rows_at_once(logits)
        # Rounded up to whole blocks; the columns beyond the vocabulary have weight 0.
        padded = logits.new_empty(min(at_once, rows), -(-vocabulary // _BLOCK) * _BLOCK, dtype=torch.float32)
        padded[:, vocabulary:] = 0.0
        parts = zip(logits.split(at_once), highest.split(at_once), uniforms.split(at_once), strict=True)
        drawn = torch.cat([_draw_rows(*part, padded[: len(part[0])], sampling) for part in parts])
    return drawn.masked_fill_(~highest[:, 0].isfinite(), NOT_FINITE)


def _rows_at_once(logits: Tensor) -> int:
    """Return how many rows to process together: on a CPU as many as stay in its cache from one operation to the next."""
    return max(1, _CACHED_NUMBERS // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))


def _draw_rows(logits: Tensor, highest: Tensor, uniforms: Tensor, padded: Tensor, sampling: SamplingConfig) -> Tensor:
    """Return a token for each of R rows, ``(R,)``; ``padded`` is a buffer ``(R, V rounded up)``, float32, 0 beyond V."""
    weights = padded[:, : logits.shape[1]]  # (R, V), a view
    weights.copy_(logits).sub_(highest)
    if sampling.temperature != 1.0:
        weights.div_(sampling.temperature)
    weights.exp_()
    _cut(weights, logits, sampling)
    return _invert(padded, uniforms[:, None])  # (R,)


def _cut(weights: Tensor, logits: Tensor, sampling: SamplingConfig) -> None:
    """Zero the weights ``(B, V)`` of tokens that min_p, top_k and top_p exclude; the largest weight of a row is 1."""
    if sampling.min_p:
        weights.masked_fill_(weights < sampling.min_p, 0.0)
    if 0 < sampling.top_k < weights.shape[1]:
        weights.masked_fill_(logits < logits.topk(sampling.top_k).values[:, -1:], 0.0)
    if sampling.top_p < 1.0:
        weights.masked_fill_(weights < _nucleus_edge(weights, sampling.top_p), 0.0)


def _nucleus_edge(weights: Tensor, top_p: float) -> Tensor:
    """Return the smallest weight, shape ``(B, 1)``, in the smallest set of tokens whose sum is at least ``top_p`` of a row's."""
    wanted = top_p * weights.sum(dim=-1, keepdim=True, dtype=torch.float64)  # (B, 1)
    largest = weights.topk(min(_CANDIDATES, weights.shape[1])).values  # (B, C), descending
    cumulative = largest.cumsum(dim=-1, dtype=torch.float64)  # (B, C)
    place = (cumulative < wanted).sum(dim=-1, keepdim=True).clamp_(max=largest.shape[1] - 1)  # (B, 1)
    edge = largest.gather(1, place)  # (B, 1)
    # Rows so flat that the nucleus does not fit in the candidates: rare, so only these take the slower search.
    flat = (cumulative[:, -1] < wanted[:, 0]).nonzero()[:, 0]
    if len(flat):
        edge[flat] = _edge_by_bits(weights[flat], wanted[flat])
    return edge


def _edge_by_bits(weights: Tensor, wanted: Tensor) -> Tensor:
    """Return the smallest of the largest weights that sum to ``wanted``; both have shape ``(B, 1)``.

    Positive floats have the same order as their bits, so a radix search finds the weight without sorting: three histograms of
    the bits, from the leading ones down, each giving the bucket in which the sum from above reaches ``wanted``.
    """
    bits, mass = weights.view(torch.int32), weights.double()  # (B, V)
    above = torch.zeros_like(wanted)  # (B, 1): sum of the weights in higher buckets
    leading = torch.zeros_like(wanted, dtype=torch.long)  # (B, 1): bits found so far
    shift = 31
    for width in _HISTOGRAM_BITS:
        if shift < 31:
            mass = mass.masked_fill_((bits >> shift) != leading, 0.0)
        shift -= width
        last = 2**width - 1
        sums = mass.new_zeros(len(weights), last + 1).scatter_add_(
            1, ((bits >> shift) & last).long(), mass
        )  # (B, buckets)
        down = sums.flip(1).cumsum(dim=-1).add_(above)  # (B, buckets): cumulative, highest bucket first
        place = (down < wanted).sum(dim=-1, keepdim=True).clamp_(max=last)
        above = down.gather(1, place) - sums.gather(1, last - place)
        leading = (leading << width) | (last - place)
    return leading.int().view(torch.float32)


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return for each row the first token whose cumulative share of the weights exceeds its number; ``(B, N)`` -> ``(B,)``."""
    blocks = weights.view(len(weights), -1, _BLOCK)  # (B, blocks, _BLOCK)
    # Sums of 16 numbers in float32, then float64: summing whole blocks in float32 would be five times less accurate.
    sums = blocks.unflatten(-1, (16, -1)).sum(dim=-2).sum(dim=-1, dtype=torch.float64)  # (B, blocks)
    cumulative = sums.cumsum(dim=-1)  # (B, blocks)
    target = _below(uniforms * cumulative[:, -1:], cumulative[:, -1:])  # (B, 1)
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=sums.shape[1] - 1)  # (B, 1)
    held = sums.gather(1, block)  # (B, 1)
    before = cumulative.gather(1, block) - held  # (B, 1)
    # (B, _BLOCK): cumulative weights inside the chosen block
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0].cumsum(dim=-1, dtype=torch.float64)
    # A relative position in the block, not the absolute remainder: the block's sum has been rounded in float32.
    share = ((target - before) / held).clamp_(min=0.0)
    target = _below(share * inside[:, -1:], inside[:, -1:])  # (B, 1)
    token = torch.searchsorted(inside, target, right=True).clamp_(max=_BLOCK - 1)  # (B, 1)
    return (block * _BLOCK + token)[:, 0]


def _below(values: Tensor, limits: Tensor) -> Tensor:
    """Return the values, or the largest number below the limit where rounding has reached it."""
    return torch.minimum(values, torch.nextafter(limits, torch.zeros_like(limits)))


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits ``(B, V)`` with those of ``seen`` tokens (bool, ``(B, V)``) divided by the penalty if positive, otherwise
    multiplied by it."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-softmax of logits ``(B, V)`` at each row's token, in nats, float32, shape ``(B,)``."""
    parts = [part.float().logsumexp(dim=-1) for part in logits.split(_rows_at_once(logits))]
    return logits.gather(1, tokens.clamp(min=0)[:, None])[:, 0].float() - torch.cat(parts)
