"""SPINTrainer: connects batching, log-probs and losses to the Trainer. It has only the policy and is method-agnostic."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spin.alignment.core.errors import NotFiniteError
from spin.alignment.logprobs.batch import PairDataset, PairList
from spin.alignment.logprobs.forward import batch_loss
from spin.alignment.logprobs.micro_batches import MicroBatch
from spin.alignment.training.batching import collate_pairs, make_pair_forward
from spin.alignment.training.config import SPINConfig
from spin.alignment.training.first_loss import FirstLoss
from spin.alignment.training.micro_batched import MicroBatchedTrainer
from spin.alignment.training.moving_reference import FIXED, MovingReference, check_can_exchange
from spin.alignment.training.objective import PairObjective
from spin.alignment.training.optimizers import optimizer_class_and_kwargs
from spin.alignment.training.preference_rows import to_pairs
from spin.alignment.training.reference_logps import attach_reference
from spin.alignment.training.start_model import identify, start_model


class SPINTrainer(MicroBatchedTrainer):
    """Trains on pairs. The loss of an optimiser step is the mean over all its pairs, regardless of how they are batched."""

    args: SPINConfig

    def __init__(
        self,
        model: torch.nn.Module | str,
        args: SPINConfig,
        train_dataset: Dataset | PairDataset,
        eval_dataset: Dataset | PairDataset | None = None,
        processing_class: Any = None,
        reference_hash: str | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """``model`` may be a folder or Hub name. The data sets contain preference rows in the project's format or TRL's (see
        :func:`to_pairs`), or encoded pairs. ``processing_class`` is the tokenizer (default: the model's own). ``reference_hash``
        identifies the initial weights of ``model``, which are the reference (default: a hash of them).

        Raises:
            InputError: a row is invalid, this architecture does not support packed rows, or the kernel does not work here.
        """
        model, processing_class = start_model(model, args, processing_class)
        self.reference_seconds = 0.0
        self.tokens_seen = 0
        self._fed: list[int] = []  # lengths of the responses given to the loss since the last log
        self.reference = self.make_reference(args)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate_pairs,
            train_dataset=to_pairs(train_dataset, "train_dataset", args, processing_class, model),
            eval_dataset=to_pairs(eval_dataset, "eval_dataset", args, processing_class, model),
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.reference_hash = reference_hash or identify(model, self.accelerator)
        # compute_loss already averages over the pairs of the whole optimiser step, so the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self.pair_forward = make_pair_forward(
            model,
            args,
            processing_class,
            self.accelerator,
            args.loss.responses,
            bool(args.alpha),
            args.share_prompts,
            args.fused_head,
        )
        self.first_loss = FirstLoss(self.pair_forward.dtype, args.output_dir)
        self.objective = PairObjective(args, self.first_loss)
        # Reference log-probs need the model as prepared for the devices, which exists only once training begins.
        self.add_callback(ReferenceCallback(self))

    def make_reference(self, args: SPINConfig) -> MovingReference | None:
        """Return the reference whose weights are kept: that of the KL term, which needs full distributions, not just log-probs.

        Raises:
            InputError: the weights are sharded in a way that does not allow it.
        """
        if not args.alpha:
            return None
        check_can_exchange(args, "alpha")
        return MovingReference(FIXED)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule. The model is prepared by now, and FSDP and DeepSpeed have not loaded a checkpoint yet."""
        self.keep_start()
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.keep_start()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def keep_start(self) -> None:
        """Copy the weights that training starts from, if the KL term needs them, before a checkpoint replaces them."""
        if self.reference is not None and not self.reference.is_kept:
            self.reference.update(self.accelerator.unwrap_model(self.model), 0)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """Return the configured optimiser: transformers' own, except for the bias-corrected RMSprop."""
        return optimizer_class_and_kwargs(args, model)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """Return the pairs of one optimiser step, and their number over all processes."""
        samples = list(itertools.islice(epoch_iterator, num_batches))
        pairs = torch.tensor(sum(map(len, samples)), device=device)
        return samples, self.accelerator.gather(pairs).sum()

    def run_pairs(self, model: Any, inputs: PairList, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """Run forward and backward on some pairs, one micro-batch at a time; return their loss."""
        rows = [] if inputs.is_stand_in else inputs.features
        self._fed += [len(row[f"{name}_ids"]) for row in rows for name in self.args.loss.responses]
        total = super().run_pairs(model, inputs, num_items_in_batch)
        if self.first_loss.value is None:
            self.first_loss.finish(self.accelerator, self.state.global_step)
        return total

    def compute_loss(
        self,
        model: Any,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of the mean loss over all pairs of the optimiser step."""
        share: Any = 1 / max(1, inputs.pairs)
        if num_items_in_batch is not None and model.training:
            share = self.accelerator.num_processes / num_items_in_batch  # DDP averages gradients over processes
        settings = {"training": model.training, "counted": inputs.counted, "step": self.state.global_step}
        objective = partial(self.objective, share=share, **settings)
        reference = self._reference_pass(inputs) if self.args.alpha else None
        loss = batch_loss(model, inputs.batch, objective, reference, self.args.loss.responses)
        faults = self.objective.take_faults()
        if faults.any() | ~torch.isfinite(loss):
            found = [inputs.features[number] for number in faults.nonzero().flatten().tolist()]
            raise self.failed(f"the loss or a log-prob is not finite (the loss is {loss.item():g})", found or None)
        loss = loss.float()
        return (loss, {}) if return_outputs else loss

    def _reference_pass(self, inputs: MicroBatch) -> Any:
        """Return what the KL term needs of the reference, whose weights take the policy's place for a forward pass."""
        assert self.reference is not None
        # Not cached: autocast would give the policy the reference's weights, as they are in the same tensors.
        autocast = partial(self.accelerator.autocast, AutocastKwargs(cache_enabled=False))
        forward = replace(self.pair_forward, model=self._unwrapped(), autocast=autocast)
        with forward.evaluation(), self.reference.in_place_of(forward.model):
            return forward.reference_pass(inputs)

    def _unwrapped(self) -> Any:
        """Return the model without the wrappers of DDP and DeepSpeed."""
        return self.accelerator.unwrap_model(self.model_wrapped)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the averages over the pairs of all processes since the last log, under their standard names."""
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        if mode == "train":
            self._check_fed()
        averages, tokens = self.objective.averages(self.accelerator, mode)
        self.tokens_seen += tokens if mode == "train" else 0
        logs |= averages
        super().log(logs, start_time)

    def _check_fed(self) -> None:
        """Check that the loss has counted every pair and completion token that it was given since the last log.

        Raises:
            RuntimeError: batching lost or repeated some (an internal error).
        """
        given = (len(self._fed) // len(self.args.loss.responses), sum(self._fed))
        counted = self.objective.metrics["train"].counted()
        self._fed = []
        if counted != given:
            raise RuntimeError(f"{given} pairs and completion tokens were batched, but the loss counted {counted}")

    def prediction_step(
        self, model: Any, inputs: PairList, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Return the mean loss of an evaluation batch, and collect its metrics."""
        total, pairs = torch.zeros((), device=self.args.device), 0
        batcher, counted = self.pair_forward.batcher, not inputs.is_stand_in
        for micro_batch in batcher.micro_batches(inputs.features, self.accelerator, counted):
            with torch.no_grad(), self.compute_loss_context_manager():
                total += self.compute_loss(model, micro_batch) * micro_batch.pairs
            pairs += micro_batch.pairs
        return total / max(1, pairs), None, None

    @property
    def steps_run(self) -> int:
        """Optimiser steps taken by this process, not counting those before a resume."""
        return self.state.global_step - self._initial_global_step

    def attach_references(self, resumed: bool) -> None:
        """Attach the reference log-probs to every data set, computing those not stored yet; skipped for a loss that needs no
        reference.

        Raises:
            InputError: the store of a resumed run is missing; the weights in memory are no longer the reference's.
        """
        self.prepare_batching(self.train_dataset, resumed)
        if not self.args.loss.needs_reference:
            return
        splits = {"train": self.train_dataset, "test": self.eval_dataset}
        folder = Path(self.args.reference_dir or Path(self.args.output_dir) / "reference")
        checkpoints = self.args.output_dir if resumed else None
        try:
            attach_reference(self.pair_forward, splits, self.reference_hash, folder, self.accelerator, checkpoints)
        except NotFiniteError as error:
            raise self.failed(str(error), error.rows, step=0) from error


class ReferenceCallback(TrainerCallback):
    """Computes the reference log-probs once the model is prepared for the devices, before the first step."""

    def __init__(self, trainer: SPINTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        started = time.monotonic()
        self.trainer.attach_references(resumed=state.global_step > 0)
        self.trainer.reference_seconds = time.monotonic() - started


__all__ = ["SPINConfig", "SPINTrainer"]
