"""RMSNorm under 16-bit autocast on a CPU, in blocks that fit the cache and with a result in 16 bits.

A model's own norm passes over float32 states five times, and the projections that read its result each convert it to 16 bits
again. Shapes: n states (tokens, or tokens and heads), d their size.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_ELEMENTS = 2**17  # half a MiB in float32


class CachedRMSNorm(torch.autograd.Function):
    """``(offset + weight) * x / sqrt(mean(x^2) + eps)`` of states ``(..., d)``, computed in float32 and returned in ``dtype``."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, offset: float, eps: float, dtype: torch.dtype) -> Tensor:
        flat = states.reshape(-1, states.shape[-1])  # (n, d)
        factor = weight.float() + offset  # (d,)
        squares = torch.linalg.vector_norm(flat, dim=-1, keepdim=True, dtype=torch.float32).square_()
        inverse = squares.div_(flat.shape[1]).add_(eps).rsqrt_()  # (n, 1)
        found = torch.empty(flat.shape, dtype=dtype)
        rows = _rows(flat)
        for x, r, out in zip(flat.split(rows), inverse.split(rows), found.split(rows), strict=True):
            out.copy_(torch.mul(x, r).mul_(factor))
        ctx.save_for_backward(states, weight, inverse)
        ctx.offset = offset
        return found.view(states.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, inverse = ctx.saved_tensors
        flat, slope = (some.reshape(-1, states.shape[-1]) for some in (states, grads[0]))  # (n, d)
        factor = weight.float() + ctx.offset
        grad_states, grad_factor = torch.empty_like(flat), torch.zeros_like(factor)
        rows = _rows(flat)
        blocks = (some.split(rows) for some in (flat, inverse, slope, grad_states))
        for x, r, g, out in zip(*blocks, strict=True):
            unit = torch.mul(x, r)  # (rows, d), float32
            g = g.float()
            product = unit * g
            grad_factor += product.sum(dim=0)
            along = torch.mv(product, factor).div_(flat.shape[1])[:, None]  # (rows, 1)
            out.copy_(torch.mul(g, factor).sub_(unit.mul_(along)).mul_(r))
        return grad_states.view(states.shape), grad_factor.to(weight.dtype), None, None, None


def _rows(flat: Tensor) -> int:
    return max(1, _BLOCK_ELEMENTS // flat.shape[1])


def install_cpu_norms(model: torch.nn.Module) -> int:
    """Let the RMSNorms of a model use :class:`CachedRMSNorm` where it applies; return their number.

    What a module computes is tried on random numbers, so norms of any model are found, and others keep their own forward.
    """
    found = 0
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if eps is not None and (offset := _offset(module, eps)) is not None:
            module.forward = MethodType(_forward(module.forward, offset, eps), module)
            found += 1
    return found


def _forward(plain: Any, offset: float, eps: float) -> Any:
    def forward(module: Any, states: Tensor) -> Tensor:
        if states.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return plain(states)
        return CachedRMSNorm.apply(states, module.weight, offset, eps, torch.get_autocast_dtype("cpu"))

    return forward


def _offset(module: torch.nn.Module, eps: float) -> float | None:
    """Return what a module adds to its weight (0, or 1 as in Gemma) if it is an RMSNorm over the last dimension."""
    weight = getattr(module, "weight", None)
    own = [name for name, _ in module.named_parameters()]
    if own != ["weight"] or weight is None or weight.dim() != 1 or not weight.numel() or weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    states, values = (torch.randn(*shape, generator=generator) for shape in ((3, len(weight)), (len(weight),)))
    inputs = (states.to(weight.device),)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        computed = torch.func.functional_call(module, {"weight": values.to(weight.device)}, inputs).cpu()
    for offset in (0.0, 1.0):
        wanted = (values + offset) * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps)
        if computed.shape == wanted.shape and torch.allclose(computed, wanted, rtol=1e-4, atol=1e-5):
            return offset
    return None
