"""SPINTrainer: joins batching, log-probs and losses to the Trainer. It holds the policy only and does not know the method."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import write_json_atomic
from spin.alignment.logprobs.attention import PACKED_ATTENTION, check_architecture, choose_kernel
from spin.alignment.logprobs.batch import PairDataset, PairList
from spin.alignment.logprobs.collators import Collator, PackedCollator, PairCollator
from spin.alignment.logprobs.forward import batch_loss, causal_model, install_packed_forward, use_attention
from spin.alignment.logprobs.head import Objective
from spin.alignment.logprobs.micro_batches import MicroBatch, MicroBatcher
from spin.alignment.logprobs.packing_check import check_packed_forward
from spin.alignment.logprobs.position_kl import check_can_keep_opponent, frozen_copy
from spin.alignment.logprobs.reference import compute_reference
from spin.alignment.logprobs.reference_store import ReferenceKey, ReferenceLogps, hash_tokens, store_path
from spin.alignment.methods.losses import LOSSES, LossInputs, LossOutputs
from spin.alignment.training.config import SPINConfig
from spin.alignment.training.memory.estimate import advice_for_out_of_memory
from spin.alignment.training.memory.plan import plan_token_budget
from spin.alignment.training.metrics import PairMetrics
from spin.alignment.training.optimizers import optimizer_class_and_kwargs
from spin.alignment.training.preference_rows import to_pairs
from spin.alignment.training.start_model import identify, start_model

logger = logging.getLogger(__name__)

FIRST_LOSS_FILE = "first_loss.json"
# Largest mean |log pi - log pi_ref| (nats per token) that rounding explains when policy and opponent are the same weights.
_SAME_MODEL_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


class SPINTrainer(Trainer):
    """Trains on pairs. The loss of an optimiser step is the mean over its pairs, however many processes and micro-batches
    they are spread over.
    """

    args: SPINConfig

    def __init__(
        self,
        model: torch.nn.Module | str,
        args: SPINConfig,
        train_dataset: Dataset | PairDataset,
        eval_dataset: Dataset | PairDataset | None = None,
        processing_class: Any = None,
        opponent_hash: str | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """
        Args:
            model: a causal language model, or the folder or Hub name of one. Its start is its own reference.
            train_dataset: preference rows, in the project's columns or TRL's (see :func:`to_pairs`), or encoded pairs.
            processing_class: the tokenizer, with a chat template; default: that of the model's folder or Hub name.
            opponent_hash: identifies the weights that ``model`` starts from; default: a hash of them.

        Raises:
            InputError: a row cannot be trained on, rows cannot be packed for this architecture, or the kernel asked for does
                not work here.
        """
        model, processing_class = start_model(model, args, processing_class)
        train_dataset = to_pairs(train_dataset, args, processing_class, "train_dataset")
        eval_dataset = to_pairs(eval_dataset, args, processing_class, "eval_dataset")
        self.first_loss: float | None = None
        self._first_losses: list[torch.Tensor] = []
        self.reference_seconds = 0.0
        self.tokens_seen = 0
        self.metrics = {"train": PairMetrics(), "eval": PairMetrics()}
        # A copy of the start, made before anything is installed or resumed: alpha needs the opponent's whole distributions.
        check_can_keep_opponent(args)
        self.opponent = frozen_copy(model, args.device) if args.alpha else None
        super().__init__(
            model=model,
            args=args,
            data_collator=PairList,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.opponent_hash = opponent_hash or identify(model, self.accelerator)
        # The loss below is a mean over the pairs of the whole optimiser step, so the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self.own_attention = str(causal_model(model).config._attn_implementation)
        pad_id = processing_class.pad_token_id
        self.padded_collator = PairCollator(pad_id if pad_id is not None else processing_class.eos_token_id)
        self.fused_head = False
        collator = self._install_packing(model) if args.batching == "packed" else self.padded_collator
        self.batcher = MicroBatcher(collator, args.max_tokens_per_batch or 0, args.pairs_per_micro_batch)
        self.add_callback(ReferenceCallback(self))

    def _install_packing(self, model: Any) -> Collator:
        causal = causal_model(model)
        check_architecture(causal)
        kernel = choose_kernel(causal, self.args.device, self.compute_dtype, self.args.packed_attention)
        fused = self.args.fused_head and self.opponent is None
        self.fused_head = install_packed_forward(model, fused)
        if self.opponent is not None:
            use_attention(self.opponent, PACKED_ATTENTION)
            logger.info(
                "alpha is %g: a copy of the opponent stands beside the policy, fused_head is off", self.args.alpha
            )
        head = "fused head" if self.fused_head else "head recomputed in the backward pass"
        logger.info("packed rows: attention kernel %s, %s", kernel, head)
        return PackedCollator(kernel, causal.config.get_text_config().vocab_size, self.args.share_prompts)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The precision of the matrix products: that of mixed precision, else that of the weights."""
        return _MIXED.get(self.accelerator.mixed_precision, self._weight_dtype())

    def _weight_dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """Return the optimiser of the settings: transformers' own, but for RMSprop's start."""
        return optimizer_class_and_kwargs(args, model)

    def train(self, *arguments: Any, **settings: Any) -> Any:
        """Train; see ``transformers.Trainer.train``.

        Raises:
            InputError: the memory ran out; the sentence says what to change before the training is taken up again.
        """
        try:
            return super().train(*arguments, **settings)
        except (RuntimeError, MemoryError) as error:
            longest = self.longest_pair()
            budget = self.batcher.token_budget or longest
            advice = advice_for_out_of_memory(error, budget, longest, self.args.gradient_checkpointing)
            if advice is None:
                raise
            raise InputError(advice) from error

    def longest_pair(self) -> int:
        """Return the tokens that the longest training pair takes in a row."""
        return max((self.batcher.collator.tokens(row) for row in self.train_dataset.rows), default=0)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """Return the pairs of one optimiser step and their number over all processes."""
        samples = list(itertools.islice(epoch_iterator, num_batches))
        pairs = torch.tensor(sum(map(len, samples)), device=device)
        return samples, self.accelerator.gather(pairs).sum()

    def floating_point_ops(self, inputs: PairList) -> float:
        """Return about how many operations the pairs of a step cost: 6 per weight and token."""
        weights = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.model.parameters())
        return 6.0 * weights * sum(self.batcher.collator.tokens(feature) for feature in inputs.features)

    def training_step(
        self, model: Any, inputs: PairList, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Pass the pairs of one optimiser step forward and backward, micro-batch by micro-batch; return their loss."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        total = torch.zeros((), device=self.args.device)
        micro_batches = self.batcher.micro_batches(inputs.features, self.accelerator, counted=not inputs.stands_in)
        for number, micro_batch in enumerate(micro_batches, start=1):
            with self._gradient_sync(model, is_last=number == len(micro_batches)):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, micro_batch, num_items_in_batch=num_items_in_batch)
                deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))
            total += loss.detach()
        if self.first_loss is None:
            self._keep_first_loss()
        return total

    @contextlib.contextmanager
    def _gradient_sync(self, model: Any, is_last: bool) -> Iterator[None]:
        """Let gradients be reduced over the processes at the last micro-batch only, where the wrapper can wait for it.

        FSDP would have to hold whole gradients until then, so it reduces every time.
        """
        self.accelerator.sync_gradients = is_last
        waits = not is_last and self.accelerator.distributed_type in (
            DistributedType.MULTI_GPU,
            DistributedType.MULTI_CPU,
        )
        with self.accelerator.no_sync(model) if waits else contextlib.nullcontext():
            yield

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
            share = self.accelerator.num_processes / num_items_in_batch
        loss = batch_loss(model, inputs.batch, self._objective(model.training, inputs.counted, share), self.opponent)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step}: lower the learning rate, or train in bfloat16 or "
                "float32"
            )
        loss = loss.float()
        return (loss, {}) if return_outputs else loss

    def _objective(self, training: bool, counted: bool, share: Any) -> Objective:
        def objective(inputs: LossInputs) -> torch.Tensor:
            outputs = LOSSES[self.args.loss_type](inputs, **self.args.loss_settings)
            losses = per_pair(outputs)
            if self.args.nll_weight:
                losses = losses + self.args.nll_weight * chosen_nll(inputs)
            if not counted:
                return losses.sum() * 0.0
            if training and self.first_loss is None:
                self._first_losses.append(per_pair(outputs).detach().sum() * share)
                self._check_opponent(inputs)
            self.metrics["train" if training else "eval"].add(inputs, outputs, losses)
            return losses.sum() * share

        return objective

    def _check_opponent(self, inputs: LossInputs) -> None:
        """Guard: at step 0 the policy is the opponent, so the preference loss is ln 2 for sigmoid."""
        if self.state.global_step > 0:
            return
        mask = inputs.completion_mask.bool()
        difference = (inputs.policy_logps.detach() - inputs.reference_logps).abs()[mask].mean().item()
        if not difference <= _SAME_MODEL_TOLERANCE.get(self.compute_dtype, 0.1):
            raise RuntimeError(
                f"policy and opponent differ by {difference:.3g} nats per token before the first step: the stored log-probs "
                "are not those of this model"
            )

    def _keep_first_loss(self) -> None:
        """Keep the mean preference loss (without NLL term) of the first optimiser step over all processes."""
        share = torch.stack(self._first_losses).sum().float() if self._first_losses else torch.zeros(())
        self.first_loss = float(self.accelerator.reduce(share.to(self.args.device), reduction="mean"))
        if self.state.global_step == 0 and self.accelerator.is_main_process:
            # Written at once: a run that is killed and resumed does not see its first step again.
            write_json_atomic(Path(self.args.output_dir) / FIRST_LOSS_FILE, self.first_loss)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the averages over all pairs of all processes since the last log, under their standard names."""
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        averages = self.metrics[mode].take(self.accelerator)
        if averages is not None and mode == "eval":
            logs |= {f"eval_{name}": value for name, value in averages.values.items()}
        elif averages is not None:
            self.tokens_seen += averages.tokens
            logs |= {name: value for name, value in averages.values.items() if name != "loss"}
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: Any,
        inputs: PairList,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Return the mean loss of an evaluation batch; its metrics are collected on the way."""
        total, pairs = torch.zeros((), device=self.args.device), 0
        for micro_batch in self.batcher.micro_batches(inputs.features, self.accelerator):
            with torch.no_grad(), self.compute_loss_context_manager():
                total += self.compute_loss(model, micro_batch) * micro_batch.pairs
            pairs += micro_batch.pairs
        return total / pairs, None, None

    @property
    def steps_run(self) -> int:
        """Optimiser steps taken by this process, those before a resume left out."""
        return self.state.global_step - self._initial_global_step

    def attach_references(self, resumed: bool) -> None:
        """Attach the opponent's log-probs to every data set, computing those that are not stored yet.

        Raises:
            InputError: a resumed run has lost its store; the weights in memory are no longer the opponent's.
        """
        self.prepare_batching(self.train_dataset, resumed)
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

    def prepare_batching(self, pairs: PairDataset, resumed: bool) -> None:
        """Check that packed rows give this model's log-probs, and choose the token budget for pairs like these."""
        if self.args.batching == "packed":
            check_packed_forward(self, pairs)
            self.batcher = replace(self.batcher, token_budget=plan_token_budget(self, pairs, resumed))

    def _compute(self, dataset: PairDataset, path: Path, key: ReferenceKey, split: str) -> None:
        def progress(done: int, total: int) -> None:
            if done == total or done % max(1, total // 10) == 0:
                logger.info("opponent's log-probs, %s split: %d of %d batches", split, done, total)

        compute_reference(self.model_wrapped, dataset, path, key, self.batcher, self.accelerator, progress)

    def _precision(self) -> str:
        how = f"{self._weight_dtype()}, autocast {self.accelerator.mixed_precision}, attention {self.own_attention}"
        collator = self.batcher.collator
        return f"{how}, packed {collator.kernel}" if isinstance(collator, PackedCollator) else how


class ReferenceCallback(TrainerCallback):
    """Computes the opponent's log-probs when the model is prepared for the devices and no step has been taken."""

    def __init__(self, trainer: SPINTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        started = time.monotonic()
        self.trainer.attach_references(resumed=state.global_step > 0)
        self.trainer.reference_seconds = time.monotonic() - started


def per_pair(outputs: LossOutputs) -> torch.Tensor:
    """Return the losses ``(B,)`` of pairs; where a loss has one for each response (``(2B,)``), the mean of a pair's two."""
    pairs = len(outputs.chosen_rewards)
    return outputs.losses if len(outputs.losses) == pairs else outputs.losses.view(2, pairs).mean(dim=0)


def chosen_nll(inputs: LossInputs) -> torch.Tensor:
    """Return the negative log-likelihood of each chosen response in nats per token, of shape ``(B,)``."""
    logps, _ = inputs.policy_logps.chunk(2)
    mask, _ = inputs.completion_mask.chunk(2)
    return -(logps * mask).sum(dim=-1) / mask.sum(dim=-1)


__all__ = ["FIRST_LOSS_FILE", "SPINConfig", "SPINTrainer", "chosen_nll", "per_pair"]
