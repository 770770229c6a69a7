"""What the trainers of pairs and of SFT share: an optimiser step is one list of rows, run as micro-batches of packed tokens."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache

from spin.alignment.core.allocator import KeptMemory
from spin.alignment.logprobs.batch import PairDataset, PairList
from spin.alignment.logprobs.micro_batches import MicroBatch
from spin.alignment.logprobs.pair_forward import PairForward
from spin.alignment.training.batching import fit_to_model
from spin.alignment.training.filler_rows import EachRowOnce
from spin.alignment.training.memory.advice import advise_when_memory_is_full
from spin.alignment.training.watched_steps import WatchedSteps


class MicroBatchedTrainer(EachRowOnce, WatchedSteps):
    """The data loader returns the rows of a whole optimiser step (:class:`PairList`); :attr:`pair_forward` divides them."""

    pair_forward: PairForward

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.kept_memory = KeptMemory()

    @abstractmethod
    def compute_loss(
        self,
        model: Any,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of the loss of the optimiser step."""

    def train(self, *arguments: Any, **settings: Any) -> Any:
        """Train; see ``transformers.Trainer.train``.

        Raises:
            InputError: memory ran out; the message says what to change before resuming.
            NotFiniteError: a loss, log-prob or gradient is not finite; the rows are saved in ``output_dir``.
        """
        with advise_when_memory_is_full(
            lambda: (self.pair_forward.batcher.token_budget, self.longest_pair()), self.args.gradient_checkpointing
        ):
            return super().train(*arguments, **settings)

    def longest_pair(self) -> int:
        """Return the number of tokens that the longest row of the training data takes up when packed."""
        return int(self.pair_forward.batcher.collator.tokens_of(self.train_rows().rows).max(initial=0))

    def train_rows(self) -> PairDataset:
        """Return the encoded rows that are trained on."""
        return self.train_dataset

    def floating_point_ops(self, inputs: PairList) -> float:
        """Return the approximate number of operations for the rows of a step: 6 per weight and token."""
        weights = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.model.parameters())
        return 6.0 * weights * sum(self.pair_forward.tokens(feature) for feature in inputs.features)

    def training_step(
        self, model: Any, inputs: PairList, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run forward and backward on the rows of one optimiser step; return their loss."""
        total = self.run_pairs(model, inputs, num_items_in_batch)
        if self.args.device.type == "cpu":
            self.kept_memory.end_phase()
        return self.end_step(total)

    def run_pairs(self, model: Any, inputs: PairList, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """Run forward and backward on some rows, one micro-batch at a time; return their loss."""
        self.begin_step([] if inputs.is_stand_in else inputs.features)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimisers have modes like a module
            self.optimizer.train()
        total = torch.zeros((), device=self.args.device)
        batcher, counted = self.pair_forward.batcher, not inputs.is_stand_in
        micro_batches = batcher.micro_batches(inputs.features, self.accelerator, counted)
        for number, micro_batch in enumerate(micro_batches, start=1):
            with gradient_sync(self.accelerator, model, is_last=number == len(micro_batches)):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, micro_batch, num_items_in_batch=num_items_in_batch)
                # DeepSpeed would divide by its accumulation steps, but the loss is already this micro-batch's share.
                deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))
            total += loss.detach()  # micro-batch losses are shares of the step's, so they add up
        frequency = self.args.torch_empty_cache_steps
        if frequency is not None and self.state.global_step % frequency == 0:
            clear_device_cache()
        return total

    def prepare_batching(self, pairs: PairDataset, resumed: bool, keeps_reference: bool = False) -> None:
        """Check that packed rows give the same log-probs as padded ones, and choose the token budget for these pairs.

        ``keeps_reference``: every step has a second copy of the trained weights.
        """
        models = (self.model_wrapped, self.model)
        self.pair_forward = fit_to_model(
            self.pair_forward, *models, pairs, self.args, self.accelerator, resumed, keeps_reference
        )


@contextlib.contextmanager
def gradient_sync(accelerator: Accelerator, model: Any, is_last: bool) -> Iterator[None]:
    """Reduce gradients over the processes only at the last micro-batch, if the wrapper supports it.

    FSDP would have to keep unsharded gradients until then, so it reduces them every time.
    """
    accelerator.sync_gradients = is_last
    waits = not is_last and accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    with accelerator.no_sync(model) if waits else contextlib.nullcontext():
        yield
