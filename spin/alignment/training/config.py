"""The settings of preference training: every key of transformers' TrainingArguments plus those of SPIN."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from transformers import TrainingArguments

from spin.alignment.core.errors import InputError, lookup
from spin.alignment.core.settings import check_settings, part_of, same_as
from spin.alignment.data.config import DataConfig, System
from spin.alignment.logprobs.attention import KERNELS
from spin.alignment.methods.losses import Loss, find_loss
from spin.alignment.methods.losses.settings import loss_arguments, shared_settings
from spin.alignment.training.keys import SPINKeys
from spin.alignment.training.optimizers import check_optimizer
from spin.alignment.training.select_best import ask_for_best

# Trainer settings that would break or be ignored here: the reason and the fix.
_REFUSED = {
    "remove_unused_columns": "pairs are not model inputs: remove the key",
    "label_smoothing_factor": "it smooths tokens, not preferences: use label_smoothing",
    "neftune_noise_alpha": "noise makes the policy differ from its reference at the first step: remove the key",
    "bf16_full_eval": "evaluation must use the same precision as the stored log-probs: remove the key",
    "fp16_full_eval": "evaluation must use the same precision as the stored log-probs: remove the key",
    "label_names": "pairs have no labels: remove the key",
    "include_num_input_tokens_seen": "a batch of pairs has no input ids (completion tokens are in metrics.json): remove the key",
    "auto_find_batch_size": "micro-batches are sized by tokens: remove the key, or set max_tokens_per_batch",
}


@dataclass
class SPINConfig(SPINKeys, TrainingArguments):
    """Every key of transformers' TrainingArguments plus those of SPIN (:class:`SPINKeys`).

    An optimiser step uses ``per_device_train_batch_size * gradient_accumulation_steps`` pairs per process. The trainer receives
    them as one batch (so ``gradient_accumulation_steps`` reads 1 afterwards) and splits it into micro-batches itself: by tokens
    when packed, into ``pairs_per_micro_batch`` pairs (the original ``per_device_train_batch_size``) when padded.
    """

    remove_unused_columns: bool = False
    # DataConfig's encoding settings: programs read them from DataConfig itself, Python users of SPINTrainer set them here.
    max_length: int = same_as(DataConfig, "max_length")
    max_prompt_length: int = same_as(DataConfig, "max_prompt_length")
    system: System = same_as(DataConfig, "system")
    retokenize: bool = same_as(DataConfig, "retokenize")
    chat_template_kwargs: dict[str, Any] = same_as(DataConfig, "chat_template_kwargs")
    template_date: str | None = same_as(DataConfig, "template_date", recorded=False)
    preprocessing_num_workers: int = same_as(DataConfig, "preprocessing_num_workers", recorded=False)

    def __post_init__(self) -> None:
        check_settings(self)
        lookup({name: name for name in ("auto", *KERNELS)}, self.packed_attention, "packed_attention")
        budget = self.max_tokens_per_batch
        if budget is not None and self.batching == "padded":
            raise InputError(
                f"max_tokens_per_batch is {budget}, but batching is padded: remove it (per_device_train_batch_size then "
                "sets the size of a micro-batch), or set batching: packed"
            )
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise InputError(f"num_train_epochs is {self.num_train_epochs}: set it to a number above 0")
        for name, reason in _REFUSED.items():
            if getattr(self, name) not in (False, None, 0, [], "no"):
                raise InputError(f"{name} is {getattr(self, name)}, but {reason}")
        check_optimizer(self.optim, self.optim_args)
        if self.torch_compile and self.batching == "packed":
            raise InputError(
                "torch_compile is true, but a compiled model cannot process packed rows (whose kernels are faster): remove it, "
                "or set batching: padded"
            )
        if self.optim in ("lomo", "adalomo"):
            raise InputError(
                f"optim is {self.optim}, which updates weights during the backward pass: choose adamw_8bit or rmsprop"
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise InputError(
                f"train_sampling_strategy is {self.train_sampling_strategy}: set it to random or sequential"
            )
        self.limits = part_of(self, DataConfig)
        shared = {item.name for item in fields(type(self))} & shared_settings()
        self.loss_arguments = loss_arguments(
            self.loss_type, {name: getattr(self, name) for name in sorted(shared)}, self.loss_settings
        )
        if self.reference_dir and not self.loss.needs_reference:
            raise InputError(f"reference_dir is set, but loss_type {self.loss_type} needs no reference: remove it")
        # The Trainer must see a whole optimiser step as one batch, so that the micro-batches can be formed by tokens.
        self.pairs_per_micro_batch = self.per_device_train_batch_size
        self.per_device_train_batch_size *= self.gradient_accumulation_steps
        self.gradient_accumulation_steps = 1
        ask_for_best(self)
        super().__post_init__()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the token for the Hub, as the Trainer stores its arguments in every checkpoint."""
        return {**self.__dict__, "hub_token": None}

    @property
    def sampled_sides(self) -> tuple[str, ...]:
        """The responses of a pair that the policy in training has sampled itself: none of stored pairs."""
        return ()

    @property
    def loss(self) -> Loss:
        """The loss named by ``loss_type``, with its declared properties."""
        return find_loss(self.loss_type)
