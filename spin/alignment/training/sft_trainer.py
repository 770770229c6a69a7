"""GroundTruthTrainer: SFT as micro-batches of packed rows. The loss of a step is the mean over its response tokens."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spin.alignment.logprobs.batch import PairDataset, PairList
from spin.alignment.logprobs.collators import trained
from spin.alignment.logprobs.forward import batch_loss
from spin.alignment.logprobs.micro_batches import MicroBatch
from spin.alignment.logprobs.target_reader import TargetReader
from spin.alignment.training.batching import collate_pairs, make_pair_forward
from spin.alignment.training.micro_batched import MicroBatchedTrainer
from spin.alignment.training.sft_config import SFTArguments
from spin.alignment.training.sft_objectives import OBJECTIVES, RowSums
from spin.alignment.training.sft_rows import RESPONSE, RESPONSES, to_sft_rows, with_labels
from spin.alignment.training.token_means import TokenMeans

if TYPE_CHECKING:
    from datasets import Dataset


class GroundTruthTrainer(MicroBatchedTrainer):
    """Trains on responses to prompts. Losses and metrics are means over all response tokens, whatever the number of processes
    and however the rows are batched; with ``average_tokens_across_devices: false``, over those of each process.
    """

    args: SFTArguments
    kind = "sft"

    def __init__(
        self,
        model: torch.nn.Module,
        args: SFTArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """The data sets contain encoded rows (see :func:`to_sft_rows`). ``processing_class`` is the tokenizer.

        Raises:
            InputError: this architecture does not support packed rows, or the kernel does not work here.
        """
        prepare_checkpointing(model, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate_pairs,
            train_dataset=to_sft_rows(train_dataset, args.length_column_name),
            eval_dataset=None if eval_dataset is None else to_sft_rows(eval_dataset, args.length_column_name),
            processing_class=processing_class,
            callbacks=callbacks,
        )
        # compute_loss already averages over the tokens of the whole optimiser step, so the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self.pair_forward = make_pair_forward(model, args, processing_class, self.accelerator, RESPONSES)
        self.means = {"train": TokenMeans(), "eval": TokenMeans()}
        self._fed = 0  # response tokens given to the loss since the last log
        self._offloading: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if args.activation_offloading:
            from trl.models import get_act_offloading_ctx_manager

            self._offloading = get_act_offloading_ctx_manager(model=self.model)
        self.add_callback(BatchingCallback(self))

    def train_rows(self) -> PairDataset:
        """Return the encoded rows that are trained on."""
        return PairDataset(self.train_dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return transformers' sampler; it finds the lengths of rows in their column, which fillers would hide."""
        return super()._get_train_sampler(getattr(train_dataset, "rows", train_dataset))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Return transformers' sampler; see :meth:`_get_train_sampler`."""
        return super()._get_eval_sampler(getattr(eval_dataset, "rows", eval_dataset))

    def completion_tokens_of(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Return the number of tokens that the rows are trained to predict."""
        return sum(len(trained(row, RESPONSE)) for row in rows)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """Return the rows of one optimiser step, and the number of tokens that its loss is the mean of."""
        samples = list(itertools.islice(epoch_iterator, num_batches))
        rows = [row for sample in samples if not sample.is_stand_in for row in sample.features]
        tokens = torch.tensor(self.completion_tokens_of(rows), device=device)
        if self.args.average_tokens_across_devices:
            tokens = self.accelerator.gather(tokens).sum()
        return samples, tokens

    def run_pairs(self, model: Any, inputs: PairList, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """Run forward and backward on some rows, one micro-batch at a time; return their loss."""
        self._fed += 0 if inputs.is_stand_in else self.completion_tokens_of(inputs.features)
        with self._offloading:
            return super().run_pairs(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: Any,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the share of this micro-batch in the mean loss over all response tokens of the optimiser step, in nats.

        Raises:
            NotFiniteError: it is not finite; the rows are saved.
        """
        tokens = self.completion_tokens_of(inputs.features) if inputs.counted else 0
        reader, sums = TargetReader(self.args.label_smoothing_factor), RowSums(OBJECTIVES[self.args.loss_type])
        total = batch_loss(model, inputs.batch, sums, responses=RESPONSES, reader=reader)
        faults = sums.faults()
        if faults.any() | ~torch.isfinite(total):
            found = [inputs.features[number] for number in faults.nonzero().flatten().tolist()]
            raise self.failed(f"the loss is {total.item()}", found or list(inputs.features), exact=bool(found))
        if inputs.counted:
            self.means["train" if model.training else "eval"].add(total, *reader.take(), tokens)
        loss = total.float() * self._share(model, tokens, num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def _share(self, model: Any, tokens: int, step_tokens: torch.Tensor | int | None) -> Any:
        """Return the weight of a token in the mean over the step, or over the micro-batch if no step is known."""
        if not tokens:
            return 0.0  # its gradients are zero, but under ZeRO-3 and FSDP every process must run a backward pass
        if step_tokens is None or not model.training:
            return 1 / tokens
        # DDP averages gradients over processes.
        return (self.accelerator.num_processes if self.args.average_tokens_across_devices else 1) / step_tokens

    def failed(self, what: str, rows: Sequence[Mapping[str, Any]] | None = None, *others: Any, **settings: Any) -> Any:
        """Save rows as ids and labels; see :meth:`WatchedSteps.failed`."""
        self._step_rows = [with_labels(row) for row in self._step_rows]
        rows = None if rows is None else [with_labels(row) for row in rows]
        return super().failed(what, rows, *others, **settings)

    def prediction_step(
        self, model: Any, inputs: PairList, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Return the mean loss over the response tokens of an evaluation batch, and collect its metrics."""
        total, tokens = torch.zeros((), device=self.args.device), 0
        batcher, counted = self.pair_forward.batcher, not inputs.is_stand_in
        for micro_batch in batcher.micro_batches(inputs.features, self.accelerator, counted):
            number = self.completion_tokens_of(micro_batch.features) if micro_batch.counted else 0
            with torch.no_grad(), self.compute_loss_context_manager():
                total += self.compute_loss(model, micro_batch) * number
            tokens += number
        return total / max(1, tokens), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means over the response tokens of all processes since the last log, under TRL's names.

        Raises:
            RuntimeError: batching lost or repeated a token (an internal error).
        """
        if "loss" in logs or any(name.startswith("eval_") for name in logs):
            mode = "train" if "loss" in logs else "eval"
            counted = self.means[mode].counted()
            if mode == "train" and counted != self._fed:
                raise RuntimeError(f"{self._fed} response tokens were batched, but the loss counted {counted}")
            self._fed = 0 if mode == "train" else self._fed
            found = self.means[mode].take(self.accelerator) | {"num_tokens": float(self.sums["tokens"])}
            if mode == "train":
                found.pop("loss", None)  # the Trainer logs the training loss itself
            logs |= found if mode == "train" else {f"eval_{name}": value for name, value in found.items()}
        super().log(logs, start_time)


def prepare_checkpointing(model: Any, args: SFTArguments) -> None:
    """Make recomputed activations reach the adapters of a model whose own weights are frozen."""
    if not args.gradient_checkpointing or not hasattr(model, "peft_config"):
        return
    model.enable_input_require_grads()
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        # Under ZeRO-3, the recomputation of frozen weights only works in this mode.
        args.gradient_checkpointing_kwargs = {**(args.gradient_checkpointing_kwargs or {}), "use_reentrant": True}


class BatchingCallback(TrainerCallback):
    """Checks packed rows and plans the token budget once the model is prepared for the devices, before the first step."""

    def __init__(self, trainer: GroundTruthTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.prepare_batching(self.trainer.train_rows(), resumed=state.global_step > 0)
