"""Token log-probabilities at response positions; the head never runs over the prompt.

Both ways of batching end here: packed rows go through the decoder with the fused head, padded rows through the model's own
forward. Both call the wrapped model (DDP, DeepSpeed, FSDP), so gathering weights and reducing gradients work as usual.

Shapes: B pairs, R response columns, N response tokens of a packed row, d hidden size, V vocabulary size.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from spin.alignment.core.sides import SIDES
from spin.alignment.logprobs.attention import PACKED_ATTENTION, register
from spin.alignment.logprobs.batch import PackedBatch
from spin.alignment.logprobs.collators import LABEL
from spin.alignment.logprobs.cpu_norms import install_cpu_norms
from spin.alignment.logprobs.head import FusedHeadLoss, LogitTransform, Objective, grouped_logps
from spin.alignment.logprobs.position_kl import ReferenceStates, grouped_logps_and_kl, padded_kl
from spin.alignment.methods.losses import LossInputs
from spin.alignment.models.sharded import reshard, whole_linear

if TYPE_CHECKING:
    from torch import Tensor

    from spin.alignment.logprobs.target_reader import TargetReader

_FLOAT32_ELEMENTS = 2**24  # logits converted to float32 at a time, 64 MiB


def install_packed_forward(model: Any, fused_head: bool = True) -> bool:
    """Add the calls ``model(packed=batch)``, ``model(packed=batch, objective=f)`` and ``model(packed=batch, states=True)``;
    return whether the head is fused.

    The first returns the log-probs (N,) of the response tokens, the second the sum of the objective over the groups, the third
    the hidden states (N, d) that predict the tokens. The head is fused if it is a single weight matrix. Any other call is passed
    to the model's own forward.
    """
    register()
    causal = causal_model(model)
    decoder, head = causal.get_decoder(), causal.get_output_embeddings()
    transform = LogitTransform.of(causal.config.get_text_config())
    fused_head = fused_head and type(head) is torch.nn.Linear
    plain_forward, plain_head = model.forward, head.forward

    # The loss is computed inside the call of the head, because that is where hooks of ZeRO-3 and FSDP gather its weight.
    def head_forward(
        module: Any,
        hidden: Tensor,
        packed: PackedBatch | None = None,
        objective: Objective | None = None,
        reference: ReferenceStates | None = None,
        reader: TargetReader | None = None,
    ) -> Tensor:
        if packed is None:
            return plain_head(hidden)
        if objective is not None and reference is not None:
            found = grouped_logps_and_kl(plain_head, hidden, reference, packed.targets, packed.groups, transform)
            inputs = [group.loss_inputs(*streams) for group, streams in zip(packed.groups, found, strict=True)]
            return torch.stack([objective(item).double() for item in inputs]).sum()
        if objective is not None and fused_head:
            arguments = (packed.targets, packed.groups, objective, transform, reader)
            hidden = hidden.to(_compute_dtype(hidden, module.weight))
            with torch.autocast(hidden.device.type, enabled=False):
                return FusedHeadLoss.apply(hidden, module.weight, module.bias, *arguments)
        logps = grouped_logps(plain_head, hidden, packed.targets, packed.groups, transform, reader)
        if objective is None:
            return logps
        return torch.stack([objective(group.loss_inputs(logps[group.rows])).double() for group in packed.groups]).sum()

    def forward(
        _: Any,
        *args: Any,
        packed: PackedBatch | None = None,
        objective: Objective | None = None,
        reference: ReferenceStates | None = None,
        reader: TargetReader | None = None,
        states: bool = False,
        **kwargs: Any,
    ) -> Any:
        if packed is None:
            return plain_forward(*args, **kwargs)
        hidden = packed_states(decoder, packed)  # (N, d)
        if states:
            return hidden
        extra = {name: value for name, value in (("reference", reference), ("reader", reader)) if value is not None}
        return head(hidden, packed=packed, objective=objective, **extra)

    head.forward = MethodType(head_forward, head)
    model.forward = MethodType(forward, model)
    use_attention(model, PACKED_ATTENTION)
    install_cpu_norms(decoder)
    return fused_head


def packed_states(decoder: Any, packed: PackedBatch) -> Tensor:
    """Return a decoder's hidden states ``(N, d)`` that predict the response tokens of a packed row."""
    rows = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
    hidden = decoder(**rows, use_cache=False, layout=packed.layout).last_hidden_state  # (1, T, d)
    return hidden[0].index_select(0, packed.predictors)  # (N, d)


def use_attention(model: Any, name: str) -> str:
    """Set a model's attention implementation; return the name of the previous one."""
    causal = causal_model(model)
    before = causal.config._attn_implementation
    causal.set_attn_implementation(name)
    return str(before)


def causal_model(model: Any) -> Any:
    """Return the causal language model inside wrappers (DDP, DeepSpeed, PEFT)."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the head's matmul: a custom autograd function is not cast by autocast."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def batch_loss(
    model: Any,
    batch: PackedBatch | dict[str, Tensor],
    objective: Objective,
    reference: ReferenceStates | Tensor | None = None,
    responses: tuple[str, ...] = SIDES,
    reader: TargetReader | None = None,
) -> Tensor:
    """Return the sum of the objective over a micro-batch, with gradients if the model is being trained.

    ``responses`` are those of a row of a padded batch; a packed batch records its own. A ``reader`` gives the objective the
    log-probs of smoothed targets, and is not used with a reference.

    With a ``reference`` (what :func:`reference_pass` returned for the batch) the objective also receives the KL at each response
    position.
    """
    if isinstance(batch, PackedBatch):
        extra = {name: value for name, value in (("reference", reference), ("reader", reader)) if value is not None}
        return model(packed=batch, objective=objective, **extra)
    labels = {name.removeprefix(LABEL): value for name, value in batch.items() if name.startswith(LABEL)}
    mask, width = batch["completion_mask"], batch["completion_mask"].shape[1]
    logits = response_logits(model, batch)  # (2B, R, V)
    policy = token_logps(logits, batch["input_ids"][:, -width:], mask, reader)  # (2B, R)
    kl = padded_kl(logits, reference, mask) if isinstance(reference, torch.Tensor) else None  # (2B, R)
    reference_logps, weights, sampler = (batch.get(name) for name in ("reference_logps", "weights", "sampler_logps"))
    return objective(LossInputs(policy, reference_logps, mask, weights, kl, labels, responses, sampler))


def reference_pass(model: Any, batch: PackedBatch | dict[str, Tensor], dtype: torch.dtype) -> ReferenceStates | Tensor:
    """Return what the KL term needs of the reference, whose weights ``model`` has at the moment; later changes do not affect it.

    Of a packed batch: the hidden states and a copy of the head, both in the ``dtype`` of matrix products. Of padded rows: the
    logits ``(2B, R, V)``. No gradients are recorded. Every process must call it if the model is sharded.
    """
    with torch.no_grad():
        if not isinstance(batch, PackedBatch):
            return response_logits(model, batch)
        hidden = model(packed=batch, states=True).to(dtype)  # (N, d)
        head = causal_model(model).get_output_embeddings()
        if not any(weight.requires_grad for weight in head.parameters()):
            return ReferenceStates(hidden)
        reshard(model)
        return ReferenceStates(hidden, *whole_linear(head, dtype))


def batch_logps(model: Any, batch: PackedBatch | dict[str, Tensor]) -> list[Tensor]:
    """Return the log-probs of each response (nats), float32 on the CPU, without padding: chosen ones, then rejected ones."""
    if not isinstance(batch, PackedBatch):
        logps = response_logps(model, batch).float().cpu()  # (2B, R)
        lengths = batch["completion_mask"].sum(dim=1).tolist()
        return [row[:length] for row, length in zip(logps, lengths, strict=True)]
    flat = model(packed=batch).float().cpu()  # (N,)
    places: list[list[Tensor]] = [[] for _ in batch.groups[0].responses]
    for group in batch.groups:
        found = group.unpadded(flat[group.rows])
        for place, some in enumerate(places):
            some.extend(found[place * group.pairs : (place + 1) * group.pairs])
    return [logps for some in places for logps in some]


def response_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return ``log pi(y_t | x, y_<t)`` in nats, float32, of shape ``(2B, R)``; 0 after the end of a response."""
    mask = batch["completion_mask"]
    return token_logps(response_logits(model, batch), batch["input_ids"][:, -mask.shape[1] :], mask)


def response_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits that predict each response position of padded rows, ``(2B, R, V)``.

    ``logits_to_keep`` leaves the head inside the model's own forward, so parameters sharded by ZeRO-3 or FSDP are gathered as
    usual and no model code is patched.
    """
    width = batch["completion_mask"].shape[1]
    known = inspect.signature(type(causal_model(model)).forward).parameters
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in known}
    if "logits_to_keep" in known:
        inputs["logits_to_keep"] = width + 1  # the first response token is predicted one column before it
    return model(**inputs, use_cache=False).logits[:, -width - 1 : -1]


def token_logps(logits: Tensor, labels: Tensor, mask: Tensor, reader: TargetReader | None = None) -> Tensor:
    """Return the log-probs of ``labels`` ``(2B, R)`` under ``logits`` ``(2B, R, V)``, in float32; 0 where the mask is 0.

    A few rows are converted to float32 at a time, and again in the backward pass: the log-softmax of the full block would be
    the largest tensor of the step.
    """
    rows = max(1, _FLOAT32_ELEMENTS // max(1, logits[0].numel()))
    read = _piece_logps if reader is None else reader.padded_logps
    pieces = list(zip(logits.split(rows), labels.split(rows), mask.split(rows), strict=True))
    if logits.requires_grad and len(pieces) > 1:
        settings = {"use_reentrant": False, "preserve_rng_state": False}
        found = [checkpoint(read, *piece, **settings) for piece in pieces]
    else:
        found = [read(*piece) for piece in pieces]
    return torch.cat(found).view(labels.shape).masked_fill(mask == 0, 0.0)


def _piece_logps(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    # (n, R, V) and (n, R) -> (n * R,); the caller applies the mask
    return -torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
