"""From logits to one drawn token for each row, by inverse CDF, without a pass over the vocabulary in double precision."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from spin.alignment.generation.base import SamplingConfig

# The vocabulary is summed in blocks in float32, the blocks in float64: the drawn block, then the token inside it.
_BLOCK = 256
_FIRST_CANDIDATES = 256
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
        weights = logits - highest
        if sampling.temperature != 1.0:
            weights.div_(sampling.temperature)
        weights.exp_()
        _cut(weights, logits, sampling)
        drawn = _invert(weights, uniforms[:, None])
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
    """Return the smallest weight, shape ``(B, 1)``, among the fewest tokens that hold ``top_p`` of each row's sum.

    Only so many of the largest weights are sorted as are needed.
    """
    wanted = top_p * weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    vocabulary = weights.shape[1]
    count = min(_FIRST_CANDIDATES, vocabulary)
    while True:
        largest = weights.topk(count).values
        cumulative = largest.cumsum(dim=-1, dtype=torch.float64)
        if count == vocabulary or bool((cumulative[:, -1:] >= wanted).all()):
            last = (cumulative < wanted).sum(dim=-1, keepdim=True).clamp_(max=count - 1)
            return largest.gather(1, last)
        count = min(8 * count, vocabulary)


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return for each row the first token whose cumulative share of the weights exceeds its number, shape ``(B,)``."""
    rows, vocabulary = weights.shape
    if vocabulary % _BLOCK:
        weights = pad(weights, (0, _BLOCK - vocabulary % _BLOCK))
    blocks = weights.view(rows, -1, _BLOCK)
    sums = blocks.sum(dim=-1).double()
    cumulative = sums.cumsum(dim=-1)
    target = _below(uniforms * cumulative[:, -1:], cumulative[:, -1:])
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=sums.shape[1] - 1)
    held = sums.gather(1, block)
    before = cumulative.gather(1, block) - held
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0].cumsum(dim=-1, dtype=torch.float64)
    # The share of the block, not the rest of the target: float32 rounds the block's sum.
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
