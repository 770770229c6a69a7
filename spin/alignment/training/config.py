"""The settings of preference training: every key of transformers' TrainingArguments and those of SPIN."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from spin.alignment.core.errors import InputError, lookup
from spin.alignment.logprobs.attention import KERNELS
from spin.alignment.methods.losses import Loss, find_loss
from spin.alignment.methods.losses.settings import loss_arguments, shared_settings
from spin.alignment.training.optimizers import check_optimizer

BATCHING = ("packed", "padded")

# Settings of the Trainer that would break or be ignored here: why, and the mend.
_REFUSED = {
    "remove_unused_columns": "pairs are not model inputs: remove the key",
    "label_smoothing_factor": "it smooths tokens, not preferences: use label_smoothing",
    "neftune_noise_alpha": "noise makes the policy differ from its opponent at the first step: remove the key",
    "bf16_full_eval": "evaluation must have the precision of the stored log-probs: remove the key",
    "fp16_full_eval": "evaluation must have the precision of the stored log-probs: remove the key",
    "label_names": "pairs have no labels: remove the key",
}


@dataclass
class SPINConfig(TrainingArguments):
    """Every key of transformers' TrainingArguments and those of SPIN; defaults follow the paper's iteration 0.

    Attributes:
        beta: strength of the implicit KL constraint (lambda in the paper).
        loss_type: a name in ``LOSSES``, or ``module:function``.
        loss_settings: settings that this loss alone has, by name; ``beta``, ``eta`` and the others below are keys themselves.
        eta: step of SPPO's targets; default ``1 / beta`` (sppo_reward: 1).
        noise_ratio: generated responses per real one (space only).
        alpha: weight of the weighted sequence-KL term taken off the margin (sigmoid, hinge, ipo).
        reverse: train on the reversed pairs: chosen and rejected, with their weights and labels, change places.
        label_smoothing: probability that a preference is wrong (sigmoid only).
        length_normalize: average token log-ratios instead of summing them.
        nll_weight: weight of the chosen response's negative log-likelihood (nats per token) added to the loss.
        reference_dir: where the opponent's log-probs are stored; default ``output_dir/reference``. May be shared by runs.
        batching: ``packed`` (one row per micro-batch, no padding) or ``padded`` (two padded rows per pair).
        max_tokens_per_batch: tokens of a micro-batch when packed; default: what the memory allows. Changes no result.
        share_prompts: pack a prompt once for both responses.
        fused_head: take the head's gradient group by group while its logits exist.
        packed_attention: kernel of packed rows: ``auto``, ``varlen``, ``flex`` or ``sdpa``.

    An optimiser step holds ``per_device_train_batch_size * gradient_accumulation_steps`` pairs per process. The trainer gets
    them as one batch (so the second number reads 1 afterwards) and forms the micro-batches itself: by tokens when packed, of
    ``pairs_per_micro_batch`` pairs, the first number, when padded.
    """

    learning_rate: float = 5e-7
    optim: str = "rmsprop"
    weight_decay: float = 0.0
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.1
    logging_steps: float = 10
    save_strategy: str = "epoch"
    gradient_accumulation_steps: int = 1
    remove_unused_columns: bool = False
    beta: float = 0.1
    loss_type: str = "sigmoid"
    loss_settings: dict[str, Any] = field(default_factory=dict)
    eta: float | None = None
    noise_ratio: float = 1.0
    alpha: float = 0.0
    reverse: bool = False
    label_smoothing: float = 0.0
    length_normalize: bool = False
    nll_weight: float = 0.0
    reference_dir: str | None = None
    batching: str = "packed"
    max_tokens_per_batch: int | None = None
    share_prompts: bool = True
    fused_head: bool = True
    packed_attention: str = "auto"

    def __post_init__(self) -> None:
        lookup({name: name for name in BATCHING}, self.batching, "batching")
        lookup({name: name for name in ("auto", *KERNELS)}, self.packed_attention, "packed_attention")
        budget = self.max_tokens_per_batch
        if budget is not None and self.batching == "padded":
            raise InputError(
                f"max_tokens_per_batch is {budget}, but batching is padded: remove it (per_device_train_batch_size then "
                "sets the micro-batch), or set batching: packed"
            )
        for name, valid, wanted in (
            ("max_tokens_per_batch", budget is None or budget >= 1, "1 or more"),
            ("beta", self.beta > 0, "a number above 0"),
            ("eta", self.eta is None or 0 < self.eta < float("inf"), "a number above 0"),
            ("noise_ratio", 0 < self.noise_ratio < float("inf"), "a number above 0"),
            ("alpha", self.alpha >= 0, "0 or more"),
            ("label_smoothing", 0 <= self.label_smoothing < 0.5, "0 or more and below 0.5"),
            ("nll_weight", self.nll_weight >= 0, "0 or more"),
            ("learning_rate", self.learning_rate > 0, "a number above 0"),
            ("per_device_train_batch_size", self.per_device_train_batch_size >= 1, "1 or more"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "1 or more"),
            ("num_train_epochs", self.num_train_epochs > 0 or self.max_steps > 0, "a number above 0"),
        ):
            if not valid:
                raise InputError(f"{name} is {getattr(self, name)}: set it to {wanted}")
        for name, reason in _REFUSED.items():
            if getattr(self, name):
                raise InputError(f"{name} is {getattr(self, name)}, but {reason}")
        check_optimizer(self.optim, self.optim_args)
        if self.torch_compile and self.batching == "packed":
            raise InputError(
                "torch_compile is true, but a compiled model cannot take packed rows (whose kernels are faster): remove it, "
                "or set batching: padded"
            )
        if self.optim in ("lomo", "adalomo"):
            raise InputError(
                f"optim is {self.optim}, which updates in each backward pass: choose adamw_8bit or rmsprop"
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise InputError(
                f"train_sampling_strategy is {self.train_sampling_strategy}: set it to random or sequential"
            )
        shared = {item.name for item in fields(type(self))} & shared_settings()
        self.loss_arguments = loss_arguments(
            self.loss_type, {name: getattr(self, name) for name in sorted(shared)}, self.loss_settings
        )
        if self.reference_dir and not self.loss.needs_reference:
            raise InputError(f"reference_dir is set, but loss_type {self.loss_type} needs no reference: remove it")
        self.pairs_per_micro_batch = self.per_device_train_batch_size
        self.per_device_train_batch_size *= self.gradient_accumulation_steps
        self.gradient_accumulation_steps = 1
        super().__post_init__()

    @property
    def loss(self) -> Loss:
        """The loss of ``loss_type``, with what it says of itself."""
        return find_loss(self.loss_type)
