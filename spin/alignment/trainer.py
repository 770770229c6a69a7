"""SPINTrainer: joins batching, log-probs and losses to the Trainer. It holds the policy only and does not know the method."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spin.alignment.batching import PairCollator, PairDataset
from spin.alignment.errors import InputError
from spin.alignment.logps import response_logps
from spin.alignment.losses import LOSSES, LossInputs, LossOutputs, loss_settings
from spin.alignment.reference import ReferenceKey, ReferenceLogps, compute_reference, hash_tokens, store_path
from spin.alignment.shards import write_json_atomic

logger = logging.getLogger(__name__)

FIRST_LOSS_FILE = "first_loss.json"
# Largest mean |log pi - log pi_ref| (nats per token) that rounding explains when policy and opponent are the same weights.
_SAME_MODEL_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}

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
        loss_type: a name in ``LOSSES``.
        label_smoothing: probability that a preference is wrong (sigmoid only).
        length_normalize: average token log-ratios instead of summing them.
        nll_weight: weight of the chosen response's negative log-likelihood (nats per token) added to the loss.
        reference_dir: where the opponent's log-probs are stored; default ``output_dir/reference``. May be shared by runs.
    """

    learning_rate: float = 5e-7
    optim: str = "rmsprop"
    weight_decay: float = 0.0
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.1
    logging_steps: float = 10
    save_strategy: str = "epoch"
    remove_unused_columns: bool = False
    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    length_normalize: bool = False
    nll_weight: float = 0.0
    reference_dir: str | None = None

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("beta", self.beta > 0, "a number above 0"),
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
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise InputError(
                f"train_sampling_strategy is {self.train_sampling_strategy}: set it to random or sequential"
            )
        self.loss_settings = loss_settings(
            self.loss_type,
            {"beta": self.beta, "label_smoothing": self.label_smoothing, "length_normalize": self.length_normalize},
        )
        super().__post_init__()


class SPINTrainer(Trainer):
    """Trains on pairs. The loss of an optimiser step is the mean over its pairs, however many processes and micro-batches
    they are spread over.
    """

    args: SPINConfig

    def __init__(
        self,
        model: Any,
        args: SPINConfig,
        train_dataset: PairDataset,
        processing_class: Any,
        opponent_hash: str,
        eval_dataset: PairDataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """``opponent_hash`` identifies the weights that ``model`` starts from: they are the opponent."""
        pad_id = processing_class.pad_token_id
        self.collator = PairCollator(pad_id if pad_id is not None else processing_class.eos_token_id)
        self.opponent_hash = opponent_hash
        self.first_loss: float | None = None
        self.reference_seconds = 0.0
        self.tokens_seen = 0
        self._sums: dict[str, dict[str, list[torch.Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        # The loss below is a mean over the pairs of the whole optimiser step, so the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self.add_callback(ReferenceCallback(self))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """Return the micro-batches of one optimiser step and their number of pairs over all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(sum(len(batch["completion_mask"]) // 2 for batch in samples), device=device)
        return samples, self.accelerator.gather(pairs).sum()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of the mean loss over all pairs of the optimiser step."""
        policy = response_logps(model, inputs)
        loss_inputs = LossInputs(policy, inputs["reference_logps"], inputs["completion_mask"], inputs.get("weights"))
        outputs = LOSSES[self.args.loss_type](loss_inputs, **self.args.loss_settings)
        losses = outputs.losses
        if self.args.nll_weight:
            losses = losses + self.args.nll_weight * chosen_nll(loss_inputs)
        if model.training and self.first_loss is None:
            self._check_first_loss(loss_inputs, outputs.losses)
        self._record("train" if model.training else "eval", loss_inputs, outputs)
        if num_items_in_batch is None or not model.training:
            loss = losses.mean()
        else:
            loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step}: lower the learning rate, or train in bfloat16 or "
                "float32"
            )
        loss = loss.float()
        return (loss, {"losses": losses.detach()}) if return_outputs else loss

    def _check_first_loss(self, inputs: LossInputs, losses: torch.Tensor) -> None:
        """Guard: at step 0 the policy is the opponent, so the preference loss (without NLL term) is ln 2 for sigmoid."""
        self.first_loss = float(losses.detach().mean())
        if self.state.global_step > 0:
            return
        if self.accelerator.is_main_process:
            # Written at once: a run that is killed and resumed does not see its first step again.
            write_json_atomic(Path(self.args.output_dir) / FIRST_LOSS_FILE, self.first_loss)
        mask = inputs.completion_mask.bool()
        difference = (inputs.policy_logps.detach() - inputs.reference_logps).abs()[mask].mean().item()
        precision = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self._weight_dtype()
        if not difference <= _SAME_MODEL_TOLERANCE.get(precision, 0.1):
            raise RuntimeError(
                f"policy and opponent differ by {difference:.3g} nats per token before the first step (loss "
                f"{self.first_loss:.6f}): the stored log-probs are not those of this model"
            )

    def _weight_dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())

    @torch.no_grad()
    def _record(self, mode: str, inputs: LossInputs, outputs: LossOutputs) -> None:
        mask = inputs.completion_mask
        chosen_mask, _ = mask.chunk(2)
        chosen, rejected = inputs.policy_logps.detach().double().sum(dim=-1).chunk(2)
        start, _ = inputs.reference_logps.double().sum(dim=-1).chunk(2)
        margins = outputs.chosen_rewards - outputs.rejected_rewards
        values = {
            "rewards/chosen": outputs.chosen_rewards,
            "rewards/rejected": outputs.rejected_rewards,
            "rewards/accuracies": (margins > 0).double(),
            "rewards/margins": margins,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "drift/chosen": chosen - start,
            "drift/chosen_per_token": (chosen - start) / chosen_mask.sum(dim=-1),
        }
        for name, value in values.items():
            self._sums[mode][name].append(value.double().sum())
        self._sums[mode]["pairs"].append(torch.tensor(len(margins), dtype=torch.double, device=margins.device))
        self._sums[mode]["tokens"].append(mask.sum().double())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the averages over all pairs of all processes since the last log, under their standard names."""
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        sums, self._sums[mode] = self._sums[mode], defaultdict(list)
        if sums:
            # float64 sums would not cross every backend (MPS); float32 is enough for a mean of pairs.
            names = sorted(sums)
            local = torch.stack([torch.stack(sums[name]).sum() for name in names]).float()
            totals = self.accelerator.reduce(local, reduction="sum").double()
            total = dict(zip(names, totals.tolist(), strict=True))
            pairs, tokens = total.pop("pairs"), total.pop("tokens")
            prefix = "eval_" if mode == "eval" else ""
            logs |= {f"{prefix}{name}": value / pairs for name, value in total.items()}
            if mode == "train":
                self.tokens_seen += int(tokens)
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Return the mean loss of an evaluation batch; its metrics are collected on the way."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    @property
    def steps_run(self) -> int:
        """Optimiser steps taken by this process, those before a resume left out."""
        return self.state.global_step - self._initial_global_step

    def attach_references(self, resumed: bool) -> None:
        """Attach the opponent's log-probs to every data set, computing those that are not stored yet.

        Raises:
            InputError: a resumed run has lost its store; the weights in memory are no longer the opponent's.
        """
        folder = Path(self.args.reference_dir or Path(self.args.output_dir) / "reference")
        for split, dataset in (("train", self.train_dataset), ("test", self.eval_dataset)):
            if dataset is None:
                continue
            key = ReferenceKey(self.opponent_hash, hash_tokens(dataset.rows), self._precision())
            path = store_path(folder, split, key)
            self.accelerator.wait_for_everyone()
            if not path.exists():
                if resumed:
                    raise InputError(
                        f"{path} is gone, and a resumed run cannot compute it: restore it, or remove the checkpoints in "
                        f"{self.args.output_dir} and start again"
                    )
                self._compute(dataset, path, key, split)
            dataset.reference = ReferenceLogps(path, key, dataset.rows)

    def _compute(self, dataset: PairDataset, path: Path, key: ReferenceKey, split: str) -> None:
        def progress(done: int, total: int) -> None:
            if done == total or done % max(1, total // 10) == 0:
                logger.info("opponent's log-probs, %s split: %d of %d batches", split, done, total)

        batch_size = self.args.per_device_eval_batch_size
        compute_reference(self.model_wrapped, dataset, path, key, self.collator, batch_size, self.accelerator, progress)

    def _precision(self) -> str:
        attention = getattr(self.model.config, "_attn_implementation", "eager")
        return f"{self._weight_dtype()}, autocast {self.accelerator.mixed_precision}, attention {attention}"


class ReferenceCallback(TrainerCallback):
    """Computes the opponent's log-probs when the model is prepared for the devices and no step has been taken."""

    def __init__(self, trainer: SPINTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        started = time.monotonic()
        self.trainer.attach_references(resumed=state.global_step > 0)
        self.trainer.reference_seconds = time.monotonic() - started


def chosen_nll(inputs: LossInputs) -> torch.Tensor:
    """Return the negative log-likelihood of each chosen response in nats per token, of shape ``(B,)``."""
    logps, _ = inputs.policy_logps.chunk(2)
    mask, _ = inputs.completion_mask.chunk(2)
    return -(logps * mask).sum(dim=-1) / mask.sum(dim=-1)
