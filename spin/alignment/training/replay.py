"""``spin replay``: the rows of a failed step again, one at a time, to find the row and the token that is not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError
from spin.alignment.training.failed_step import FailedStep, read_failed_step, row_name


@dataclass(frozen=True)
class Replayed:
    """One row: its loss under the given weights, and the first number that is not finite, in words; empty if all are."""

    name: str
    loss: float
    fault: str


def replay(folder: Path, model: str | None = None) -> list[Replayed]:
    """Recompute the loss of every row of a failed step, print a line for each, and return them.

    The weights are those of ``model``, else of the last checkpoint beside the folder, else those that training started from.

    Raises:
        InputError: the folder has no record, no weights are found, or the model has another vocabulary.
    """
    from spin.alignment.data.chat_encoder import load_tokenizer
    from spin.alignment.models.vocabulary import check_ids

    step, rows = read_failed_step(folder)
    name = model or last_checkpoint(folder.parent) or step.model
    if not name:
        raise InputError(f"{folder} does not name its model: give one with --model")
    say(f"{step.what} {step.when}; {len(rows)} rows under the weights of {name}")
    policy = load_weights(name, step.model)
    ids = (token for row in rows for column, values in row.items() if column.endswith("_ids") for token in values)
    check_ids(ids, policy.config, name, f"the record in {folder}")
    tokenizer = load_tokenizer(step.model or name)
    compute = replay_pair if step.kind == "pairs" else replay_sequence
    found = []
    for row in rows:
        loss, fault = compute(policy, step, row, tokenizer)
        found.append(Replayed(row_name(row), loss, fault))
        say(f"{found[-1].name}: loss {loss:.6g}" + (f"; first not finite: {fault}" if fault else ""))
    bad = sum(bool(item.fault) for item in found)
    if bad:
        say(f"{bad} of {len(found)} rows are not finite")
    else:
        say(f"all rows are finite under {name}: the weights had diverged since; lower the learning rate")
    return found


def last_checkpoint(output_dir: Path) -> str | None:
    """Return the last complete checkpoint of a training, if any."""
    numbers = [
        int(path.name.removeprefix("checkpoint-"))
        for path in output_dir.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and (path / "trainer_state.json").is_file()
    ]
    return str(output_dir / f"checkpoint-{max(numbers)}") if numbers else None


def load_weights(name: str, start: str) -> Any:
    """Load a model in float32: a saved one, or the adapters of a checkpoint on the model that training started from."""
    from spin.alignment.models.config import ModelConfig
    from spin.alignment.models.loading import load_model

    adapters = (Path(name) / "adapter_config.json").is_file()
    model = load_model(ModelConfig(model_name_or_path=start if adapters else name, dtype="float32"))
    if adapters:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, name).merge_and_unload()
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def replay_pair(model: Any, step: FailedStep, row: Mapping[str, Any], tokenizer: Any) -> tuple[float, str]:
    """Return the preference loss of one pair, without an NLL or KL term, and its first fault."""
    from spin.alignment.logprobs.collators import PairCollator
    from spin.alignment.logprobs.forward import response_logps
    from spin.alignment.methods.losses import LossInputs, find_loss
    from spin.alignment.training.objective import per_pair

    loss = find_loss(step.settings["loss_type"])
    device = next(model.parameters()).device
    tensors = {name: value.to(device) for name, value in PairCollator(0, loss.responses)([row]).items()}
    with torch.no_grad():
        logps = response_logps(model, tensors)  # (k, R) for the k responses of the pair
    mask = tensors["completion_mask"]
    labels = {name.removeprefix("label/"): value for name, value in tensors.items() if name.startswith("label/")}
    streams = {
        "log-prob": logps,
        "reference log-prob": tensors.get("reference_logps"),
        "weight": tensors.get("weights"),
    }
    fault = ""
    for stream, values in streams.items():
        fault = fault or _first_fault(stream, values, mask, row, loss.responses, tokenizer)
    for label, values in labels.items():
        if not fault and not torch.isfinite(values).all():
            fault = f"label {label} of {loss.responses[int((~torch.isfinite(values)).nonzero()[0])]}"
    inputs = LossInputs(
        logps, tensors.get("reference_logps"), mask, tensors.get("weights"), None, labels, loss.responses
    )
    if loss.needs_reference and inputs.reference_logps is None:
        return math.nan, fault or "the row has no reference log-probs"
    outputs = loss(inputs, **step.settings["loss_arguments"])
    return float(per_pair(outputs)[0]), fault


def _first_fault(
    stream: str, values: Any, mask: Any, row: Mapping[str, Any], responses: tuple[str, ...], tokenizer: Any
) -> str:
    """Return the first response token at which a stream ``(k, R)`` is not finite, in words."""
    places = [] if values is None else (~torch.isfinite(values) & mask.bool()).nonzero().tolist()
    if not places:
        return ""
    number, place = places[0]
    token = row[f"{responses[number]}_ids"][place]
    value = float(values[number, place])
    text = json.dumps(tokenizer.decode([token]))
    return f"{stream} {value} at token {place} of {responses[number]} (id {token}, {text})"


def replay_sequence(model: Any, step: FailedStep, row: Mapping[str, Any], tokenizer: Any) -> tuple[float, str]:
    """Return the mean NLL (nats per token) of one SFT row over its labelled tokens, and its first fault."""
    device = next(model.parameters()).device
    ids = torch.tensor([row["input_ids"]], device=device)
    labels = torch.tensor(row["labels"], device=device)
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].float().log_softmax(dim=-1)  # (T - 1, V)
    trained = labels[1:] != -100
    chosen = logps.gather(1, ids[0, 1:, None])[:, 0]  # (T - 1,)
    bad = (~torch.isfinite(chosen) & trained).nonzero().flatten().tolist()
    if not bad:
        return float(-chosen[trained].mean()), ""
    token = row["input_ids"][bad[0] + 1]
    text = json.dumps(tokenizer.decode([token]))
    return math.nan, f"log-prob {float(chosen[bad[0]])} at token {bad[0] + 1} (id {token}, {text})"
