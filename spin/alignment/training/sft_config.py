"""The settings of SFT: every key of TRL's SFTConfig, kept with its meaning or refused, plus those of the packed engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from trl import SFTConfig

from spin.alignment.core.errors import InputError, lookup, shown
from spin.alignment.core.settings import check_settings
from spin.alignment.logprobs.attention import KERNELS
from spin.alignment.training.keys import SFTKeys
from spin.alignment.training.select_best import ask_for_best
from spin.alignment.training.sft_objectives import OBJECTIVES

# Keys of TRL that load a model or encode rows, which this program does itself, with the values they have if they are not set.
_NOT_USED = {
    "model_init_kwargs": None,
    "dataset_kwargs": None,
    "dataset_text_field": "text",
    "eval_packing": None,
    "eos_token": None,
    "pad_token": None,
    "chat_template_path": None,
    "truncation_mode": "keep_start",
    "shuffle_dataset": False,
}
_BY_TOKENS = "micro-batches are sized by tokens: remove the key, or set max_tokens_per_batch"
_OWN_PACKING = "run_sft.py packs rows itself, without padding and without joining or cutting them: remove the key"
_ROUNDS = "the weights would be rounded to 16 bits before they are saved: remove the key"
# Settings that would break or be ignored here: the values that ask for nothing, and the reason and the fix for any other.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "packing_strategy": (("bfd",), _OWN_PACKING),
    "padding_free": ((False,), _OWN_PACKING),
    "pad_to_multiple_of": (("auto", None), _OWN_PACKING),
    "auto_find_batch_size": ((False,), _BY_TOKENS),
    "bf16_full_eval": ((False,), _ROUNDS),
    "fp16_full_eval": ((False,), _ROUNDS),
    "label_names": ((None, []), "the labels are those of the encoded rows: remove the key"),
    "include_num_input_tokens_seen": ((False, None, "no"), "num_tokens in the log counts them: remove the key"),
    "router_aux_loss_coef": (
        (None, 0.0),
        "a load-balancing loss of experts is not computed here: set it to 0 to train without one",
    ),
}


@dataclass
class SFTArguments(SFTKeys, SFTConfig):
    """Every key of TRL's SFTConfig, with the defaults of :class:`SFTKeys`.

    An optimiser step uses ``per_device_train_batch_size * gradient_accumulation_steps`` rows per process. The trainer receives
    them as one batch (so ``gradient_accumulation_steps`` reads 1 afterwards) and splits it into micro-batches itself: by tokens
    when packed, into ``pairs_per_micro_batch`` rows (the original ``per_device_train_batch_size``) when padded.
    """

    max_length: int | None = 1024

    def __post_init__(self) -> None:
        check_settings(self)
        lookup({name: name for name in ("auto", *KERNELS)}, self.packed_attention, "packed_attention")
        self._check_refused()
        self._check_batching()
        self._check_loss()
        if self.use_liger_kernel:
            # It replaces the model's forward, which is patched to run packed rows; Liger's layers are used.
            given = self.liger_kernel_config or {}
            self.liger_kernel_config: dict[str, bool] | None = {**given, "fused_linear_cross_entropy": False}
        # Columns are those that the trainer encodes, and each is used.
        self.remove_unused_columns = False
        # The Trainer must see a whole optimiser step as one batch, so that the micro-batches can be formed by tokens.
        self.pairs_per_micro_batch = self.per_device_train_batch_size
        self.per_device_train_batch_size *= self.gradient_accumulation_steps
        self.gradient_accumulation_steps: int = 1
        ask_for_best(self)
        super().__post_init__()

    def _check_refused(self) -> None:
        if self.packing or self.completion_only_loss is False or self.assistant_only_loss:
            raise InputError(
                "packing, completion_only_loss and assistant_only_loss are controlled by run_sft.py: remove the key"
            )
        for name, default in _NOT_USED.items():
            if getattr(self, name) != default:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}, but run_sft.py loads the model and encodes the rows "
                    "itself, with the tokens of its tokenizer: remove the key"
                )
        for name, (harmless, reason) in _REFUSED.items():
            if getattr(self, name) not in harmless:
                raise InputError(f"{name} is {shown(getattr(self, name))}, but {reason}")

    def _check_batching(self) -> None:
        packed = self.batching == "packed"
        if self.max_tokens_per_batch is not None and not packed:
            raise InputError(
                f"max_tokens_per_batch is {self.max_tokens_per_batch}, but batching is padded: remove it "
                "(per_device_train_batch_size then sets the size of a micro-batch), or set batching: packed"
            )
        if packed and self.torch_compile:
            raise InputError(
                "torch_compile is true, but a compiled model cannot process packed rows (whose kernels are faster): remove it, "
                "or set batching: padded"
            )
        if packed and self.neftune_noise_alpha:
            raise InputError(
                f"neftune_noise_alpha is {self.neftune_noise_alpha}, but the noise depends on the length of a row, and packed "
                "rows hold several: set batching: padded, or remove it"
            )
        if self.optim in ("lomo", "adalomo"):
            raise InputError(
                f"optim is {self.optim}, which updates weights during the backward pass: choose adamw_8bit or rmsprop"
            )
        if self.activation_offloading and not torch.cuda.is_available():
            raise InputError("activation_offloading is true, but there is no GPU to move activations from: remove it")
        if self.use_liger_kernel and (self.liger_kernel_config or {}).get("fused_linear_cross_entropy"):
            raise InputError(
                "liger_kernel_config sets fused_linear_cross_entropy, but the head is fused with the loss here: remove it"
            )

    def _check_loss(self) -> None:
        if self.label_smoothing_factor and not OBJECTIVES[self.loss_type].takes_smoothing:
            raise InputError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, but loss_type {self.loss_type} weighs each token by "
                "its own probability: remove one of them"
            )
