"""From logits to one drawn token for each row, by inverse CDF, without a pass over the vocabulary in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

from spin.alignment.generation.base import SamplingConfig

# First the block of the vocabulary is drawn, then the token inside it.
_BLOCK = 256
# Largest weights in which the edge of a nucleus is looked for first.
_CANDIDATES = 256
# The 31 bits of a positive float32, in the pieces by which the edge of a nucleus is searched.
_HISTOGRAM_BITS = (12, 12, 7)
NOT_FINITE = -1


def draw_tokens(logits: Tensor, uniforms: Tensor | None, sampling: SamplingConfig) -> Tensor:
    """Return one token for each row, shape ``(B,)``; ``NOT_FINITE`` where the logits hold NaN or are infinite.

    Temperature comes first, then min_p, top_k and top_p, each on what the one before left over (vLLM's order). Tokens as likely
    as the last one kept are kept too, so that no tie is broken by chance. The token is the first whose cumulative
    probability, in the order of the vocabulary, exceeds the row's number.

    Args:
        logits: shape ``(B, V)``, float32.
        uniforms: numbers in [0, 1), shape ``(B,)``, float64; not used at temperature 0.
    """
    highest = logits.amax(dim=-1, keepdim=True)
    if sampling.temperature == 0.0:
        drawn = logits.argmax(dim=-1)
    else:
        assert uniforms is not None
        rows, vocabulary = logits.shape
        # Whole blocks: the columns behind the vocabulary weigh nothing.
        padded = logits.new_empty(rows, -(-vocabulary // _BLOCK) * _BLOCK)
        padded[:, vocabulary:] = 0.0
        weights = padded[:, :vocabulary]
        torch.sub(logits, highest, out=weights)
        if sampling.temperature != 1.0:
            weights.div_(sampling.temperature)
        weights.exp_()
        _cut(weights, logits, sampling)
        drawn = _invert(padded, uniforms[:, None])
    return drawn.masked_fill_(~highest[:, 0].isfinite(), NOT_FINITE)


def _cut(weights: Tensor, logits: Tensor, sampling: SamplingConfig) -> None:
    """Set the weights of tokens beyond the cut-offs to zero; the largest weight of a row is 1."""
    if sampling.min_p:
        weights.masked_fill_(weights < sampling.min_p, 0.0)
    if 0 < sampling.top_k < weights.shape[1]:
        weights.masked_fill_(logits < logits.topk(sampling.top_k).values[:, -1:], 0.0)
    if sampling.top_p < 1.0:
        weights.masked_fill_(weights < _nucleus_edge(weights, sampling.top_p), 0.0)


def _nucleus_edge(weights: Tensor, top_p: float) -> Tensor:
    """Return the smallest weight, shape ``(B, 1)``, among the fewest tokens that hold ``top_p`` of each row's sum."""
    wanted = top_p * weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    largest = weights.topk(min(_CANDIDATES, weights.shape[1])).values
    cumulative = largest.cumsum(dim=-1, dtype=torch.float64)
    place = (cumulative < wanted).sum(dim=-1, keepdim=True).clamp_(max=largest.shape[1] - 1)
    edge = largest.gather(1, place)
    flat = (cumulative[:, -1] < wanted[:, 0]).nonzero()[:, 0]
    if len(flat):
        edge[flat] = _edge_by_bits(weights[flat], wanted[flat])
    return edge


def _edge_by_bits(weights: Tensor, wanted: Tensor) -> Tensor:
    """Return the smallest of the largest weights that sum up to ``wanted``; both results and sums have shape ``(B, 1)``.

    Positive floats are ordered as their bits are, so the weight is found in three histograms of the bits, from the leading ones
    down, without a sort: in each, the bucket in which the mass from above reaches what is wanted.
    """
    bits, mass = weights.view(torch.int32), weights.double()
    above = torch.zeros_like(wanted)
    leading = torch.zeros_like(wanted, dtype=torch.long)
    shift = 31
    for width in _HISTOGRAM_BITS:
        if shift < 31:
            mass = mass.masked_fill_((bits >> shift) != leading, 0.0)
        shift -= width
        last = 2**width - 1
        sums = mass.new_zeros(len(weights), last + 1).scatter_add_(1, ((bits >> shift) & last).long(), mass)
        down = sums.flip(1).cumsum(dim=-1).add_(above)
        place = (down < wanted).sum(dim=-1, keepdim=True).clamp_(max=last)
        above = down.gather(1, place) - sums.gather(1, last - place)
        leading = (leading << width) | (last - place)
    return leading.int().view(torch.float32)


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return for each row the first token whose cumulative share of the weights exceeds its number, shape ``(B,)``."""
    blocks = weights.view(len(weights), -1, _BLOCK)
    # Sixteen numbers at a time in float32: whole blocks so would move the steps of the cumulative sum five times as far.
    sums = blocks.unflatten(-1, (16, -1)).sum(dim=-2).sum(dim=-1, dtype=torch.float64)
    cumulative = sums.cumsum(dim=-1)
    target = _below(uniforms * cumulative[:, -1:], cumulative[:, -1:])
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=sums.shape[1] - 1)
    held = sums.gather(1, block)
    before = cumulative.gather(1, block) - held
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0].cumsum(dim=-1, dtype=torch.float64)
    # The share of the block, not the rest of the target: float32 has rounded the block's sum.
    share = ((target - before) / held).clamp_(min=0.0)
    target = _below(share * inside[:, -1:], inside[:, -1:])
    token = torch.searchsorted(inside, target, right=True).clamp_(max=_BLOCK - 1)
    return (block * _BLOCK + token)[:, 0]


def _below(values: Tensor, limits: Tensor) -> Tensor:
    """Return the values, or the next number below the limit where rounding reached it."""
    return torch.minimum(values, torch.nextafter(limits, torch.zeros_like(limits)))


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return the logits, those of ``seen`` tokens (bool, ``(B, V)``) divided by the penalty above 0, multiplied below."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-softmax of each row at its token, in nats, shape ``(B,)``."""
    return logits.gather(1, tokens.clamp(min=0)[:, None])[:, 0] - logits.logsumexp(dim=-1)
