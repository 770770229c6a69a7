"""The trained policy: gathering its weights from all processes, saving it, and what rounding it to 16 bits would lose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spin.alignment.core.console import say
from spin.alignment.models.adapters import merge_adapters
from spin.alignment.models.loading import load_model
from spin.alignment.models.precision import compute_name
from spin.alignment.models.saving import finite_state, most_common_dtype, save_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spin.alignment.training.settings import Settings

_16_BITS = ("bfloat16", "float16")


@dataclass(frozen=True)
class RoundingLoss:
    """What saving in 16 bits loses of an update from the weights w0 to w.

    Attributes:
        update: ``||round(w) - w|| / ||w - w0||``: the error of rounding relative to the update; above 1 it is the larger one.
        unchanged: the share of changed weights that are saved as ``round(w0)``, as if they had never been trained.
    """

    update: float
    unchanged: float

    def sentence(self, dtype: str) -> str:
        """Return the line that is printed when the policy is saved."""
        return (
            f"saving in {dtype} loses {self.update:.1%} of the update (norm of the rounding error over that of the update); "
            f"{self.unchanged:.1%} of the changed weights return to their values at the start; save_dtype: float32 loses nothing"
        )


def save_policy(trainer: Any, settings: Settings) -> dict[str, Any]:
    """Save the trained policy as a standalone model, in ``save_dtype``; return the entries of ``metrics.json`` about it.

    Sharded weights are gathered and adapters are merged. Every process must call it; the result is empty in all but the main one.

    Raises:
        NotFiniteError: a weight is not finite; nothing is written.
    """
    accelerator = trainer.accelerator
    # Outside the condition below: gathering shards is a collective operation.
    state_dict: Mapping[str, torch.Tensor] = gathered_state(trainer)
    entries: dict[str, Any] = {}
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(trainer.model_wrapped)
        if settings.model.use_peft:
            model = merge_adapters(model, dict(state_dict), settings.model)
            state_dict = model.state_dict()
        wanted, trained = settings.output.save_dtype, most_common_dtype(state_dict)
        dtype = None if wanted == "auto" else getattr(torch, wanted)
        if wanted in _16_BITS and trained == torch.float32:
            loss = rounding_loss(state_dict, settings, dtype)
            say(loss.sentence(wanted))
            entries = {"rounding_loss": {"update": loss.update, "unchanged": loss.unchanged}}
        compute = compute_name(settings.arguments)
        save_checkpoint(model, trainer.processing_class, settings.output_dir, dict(state_dict), dtype, compute)
        entries = {"save_dtype": str(dtype or trained).removeprefix("torch."), **entries}
    accelerator.wait_for_everyone()
    return entries


def gathered_state(trainer: Any) -> dict[str, torch.Tensor]:
    """Return the weights of the whole model as they were trained, on the main process. Every process must call it.

    DeepSpeed trains float32 copies, but gathers the 16-bit weights that are computed with: the copies are taken instead.
    """
    accelerator, wrapped = trainer.accelerator, trainer.model_wrapped
    state: dict[str, torch.Tensor] = accelerator.get_state_dict(wrapped) or {}
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return state
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in accelerator.unwrap_model(wrapped).named_parameters():
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            master = safe_get_full_fp32_param(parameter)  # of the whole weight, in every process
            if accelerator.is_main_process and master is not None:
                state[name] = master.cpu()
    return state


def rounding_loss(state_dict: Mapping[str, torch.Tensor], settings: Settings, dtype: torch.dtype) -> RoundingLoss:
    """Compare trained float32 weights with those that training started from, which are loaded again."""
    from dataclasses import replace

    if settings.arguments.deepspeed_plugin is not None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        # Only the main process loads the weights: loading them into ZeRO-3 partitions is a collective operation.
        unset_hf_deepspeed_config()
    source = replace(settings.model, dtype="auto", load_in_4bit=False, load_in_8bit=False)
    start = load_model(source, settings.arguments.seed).state_dict()
    rounded = finite_state(state_dict, dtype)
    error = moved = 0.0
    changed = unchanged = 0
    for name, weight in state_dict.items():
        if not weight.is_floating_point():
            continue
        before = start[name].to(weight.device, weight.dtype)
        error += (rounded[name].to(weight.dtype) - weight).double().pow(2).sum().item()
        moved += (weight - before).double().pow(2).sum().item()
        differs = weight != before
        changed += int(differs.sum())
        unchanged += int((differs & (rounded[name] == before.to(dtype))).sum())
    return RoundingLoss((error / moved) ** 0.5 if moved else 0.0, unchanged / max(1, changed))


class MasterWeights(TrainerCallback):
    """Starts DeepSpeed's float32 copies from the checkpoint's float32 weights; it makes them from the 16-bit weights it loads."""

    def __init__(self, trainer: Any, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:  # a resumed run has loaded its copies from the checkpoint
            restore_masters(self.trainer, self.folder)


def restore_masters(trainer: Any, folder: Path) -> int:
    """Set DeepSpeed's float32 copies to the float32 weights of a model folder; return how many. Every process must call it."""
    from deepspeed.utils import safe_set_full_fp32_param
    from safetensors import safe_open

    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    parameters = {
        name: weight for name, weight in model.named_parameters() if weight.requires_grad and weight.dtype.itemsize < 4
    }
    restored = 0
    for path in sorted(folder.glob("*.safetensors")) if parameters else ():
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                if name in parameters and file.get_slice(name).get_dtype() == "F32":
                    safe_set_full_fp32_param(parameters[name], file.get_tensor(name).to(trainer.args.device))
                    restored += 1
    return restored
