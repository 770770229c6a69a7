"""OnlineTrainer: each step samples, labels and pairs responses, and updates the policy against an earlier state of itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl

from spin.alignment.core.errors import InputError, NotFiniteError
from spin.alignment.generation.base import PromptRequest, SamplingConfig, sample_seed
from spin.alignment.logprobs.batch import PairDataset, PairList
from spin.alignment.logprobs.forward import causal_model
from spin.alignment.models.config import ModelConfig
from spin.alignment.training.config import SPINConfig
from spin.alignment.training.importance import Importance
from spin.alignment.training.moving_reference import MovingReference
from spin.alignment.training.online.batch_ahead import BatchAhead
from spin.alignment.training.online.config import OnlineConfig
from spin.alignment.training.online.kept_responses import keep_responses
from spin.alignment.training.online.labels import PairMaker, StepCounts, scorer_of
from spin.alignment.training.online.lookahead import Lookahead
from spin.alignment.training.online.pass_rates import held_out_sums, pass_log
from spin.alignment.training.online.policy_sampler import OverlappingSampler
from spin.alignment.training.online.prompts import OnlinePrompt, PromptDataset, load_held_out, longest_pairs, to_prompts
from spin.alignment.training.online.reference_pass import attach_reference_logps
from spin.alignment.training.online.samplers import make_sampler
from spin.alignment.training.online.step_log import evaluation_log, reduced, summed, training_log
from spin.alignment.training.preference_rows import args_encoder
from spin.alignment.training.start_model import start_model
from spin.alignment.training.trainer import SPINTrainer


class OnlineTrainer(SPINTrainer):
    """A Trainer step is one batch of prompts; checkpointing, resuming, schedules and logging are the Trainer's own.

    The reference is the policy as of the last step whose number is a multiple of ``ref_update_freq``, up to the step at which the
    responses were sampled. With 1 it is the policy that sampled them. A copy of the trained weights is kept, and stored in every
    checkpoint, unless the reference is the policy before its update: with 1 and ``async_steps: 0``.

    With ``async_steps: 1``, a step first begins to sample the batch of the next step, with the weights it is about to update.
    """

    args: OnlineConfig
    control: TrainerControl
    reference: MovingReference

    def __init__(
        self,
        model: torch.nn.Module | str,
        args: OnlineConfig,
        train_dataset: Dataset | PromptDataset,
        eval_dataset: Dataset | PromptDataset | None = None,
        processing_class: Any = None,
        reference_hash: str | None = None,
        pair_maker: PairMaker | None = None,
        source: ModelConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """``model``, ``processing_class`` and ``reference_hash`` are as in :class:`SPINTrainer`. The data sets contain prompts
        (see :func:`to_prompts`); ``eval_dataset`` defaults to the prompts of ``eval_prompts``. ``pair_maker`` labels and pairs
        responses (default: with the scorer of ``args``). An engine loads the model from ``source`` (default: its folder or name).

        Raises:
            InputError: as in :class:`SPINTrainer`, or the scorer, the engine or a prompt cannot be used.
        """
        model, processing_class = start_model(model, args, processing_class)
        encoder = pair_maker.encoder if pair_maker is not None else args_encoder(args, processing_class, model)
        if eval_dataset is not None and args.scorer is None:
            raise InputError("eval_dataset is given, but there is no scorer to rate the responses: set scorer")
        if eval_dataset is None and args.eval_prompts:
            eval_dataset, _ = load_held_out(args.eval_prompts, args, encoder)
        self.pair_maker = pair_maker or PairMaker(args, encoder, scorer_of(args))
        self.counts = StepCounts()
        self._last_tokens = 0
        # The last evaluation: what it was of (prefix and step), and its metrics.
        self._evaluated: tuple[tuple[str, int], dict[str, float]] | None = None
        self._resumed_from: Path | None = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=to_prompts(train_dataset, args, encoder, "train_dataset"),
            eval_dataset=to_prompts(eval_dataset, args, encoder, "eval_dataset"),
            processing_class=processing_class,
            reference_hash=reference_hash,
            callbacks=callbacks,
        )
        source = source or ModelConfig(str(getattr(causal_model(model).config, "_name_or_path", "")))
        own_attention = self.pair_forward.own_attention
        self.sampler = make_sampler(model, source, args, encoder, own_attention, self.compute_loss_context_manager)
        self.ahead = BatchAhead(cast(OverlappingSampler, self.sampler)) if args.async_steps else None
        self._lookahead: Lookahead | None = None
        self.objective.importance = Importance(args.importance_cap)
        # The single update of a step is against the policy before it, whose log-probs need no pass of their own.
        self.objective.reference_is_policy = not self.reference.keeps_copy and args.updates_per_batch == 1

    def make_reference(self, args: SPINConfig) -> MovingReference:
        """Return the reference, which the steps update."""
        assert isinstance(args, OnlineConfig)
        is_ahead = args.async_steps > 0 and args.loss.needs_reference
        return MovingReference(args.ref_update_freq, read_after_updates=bool(args.alpha), is_ahead=is_ahead)

    def keep_start(self) -> None:
        """Do nothing: the first step copies the weights, or a checkpoint has them."""

    def train(self, resume_from_checkpoint: Any = None, **settings: Any) -> Any:
        """Train; see ``transformers.Trainer.train``."""
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._evaluated = None
        self._lookahead = None
        if self.ahead is not None:
            self.ahead.drop()  # of a training that was stopped
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **settings)

    def attach_references(self, resumed: bool) -> None:
        """Check packed rows and plan the token budget on synthetic pairs of maximum length; load the stored reference.

        Raises:
            InputError: the reference of a resumed run is missing.
        """
        self.prepare_batching(self.longest_pairs(), resumed, self.reference.keeps_copy)
        if resumed:
            assert self._resumed_from is not None
            self.reference.load(self._resumed_from, self._unwrapped())
            if self.ahead is not None:
                self.ahead.load(self._resumed_from)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """Return the prompts of one step, and their number over all processes; know those of the next step if they are sampled
        ahead."""
        if self.ahead is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._lookahead is None or self._lookahead.epoch is not epoch_iterator:
            self._lookahead = Lookahead(epoch_iterator, self._first_of_next_epoch)
        return super().get_batch_samples(self._lookahead, num_batches, device)

    def _first_of_next_epoch(self) -> PairList | None:
        """Return the first batch of prompts of the next epoch, whose order depends on the seed and its number only."""
        loader = self.callback_handler.train_dataloader
        # The order of the epoch that has ended is not needed any more; a new iterator draws random numbers, which must not count.
        with torch.random.fork_rng(devices=[]):
            loader.set_epoch((self.state.global_step + 1) // len(loader))
            return next(iter(loader), None)

    def longest_pairs(self) -> PairDataset:
        """Return pairs as long as any that a step can create; memory is planned for these."""
        end_id = self.processing_class.eos_token_id
        return longest_pairs(self.train_dataset.prompts, self.args.max_new_tokens, end_id)

    def floating_point_ops(self, inputs: PairList) -> float:
        """Return the approximate number of operations of the last update: 6 per weight and token."""
        return 6.0 * sum(parameter.numel() for parameter in self.model.parameters()) * self._last_tokens

    def longest_pair(self) -> int:
        """Return the largest number of tokens that a pair can have."""
        return max(self.pair_forward.tokens(row) for row in self.longest_pairs().rows)

    def training_step(
        self, model: Any, inputs: PairList, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Create the pairs of a batch of prompts and update the policy on them in ``updates_per_batch`` optimiser steps."""
        prompts = prompts_of(inputs)
        responses, lag = self._sample(prompts)
        pairs = self.make_pairs(prompts, responses)
        if self.ahead is not None:  # after the reference of this batch was read, for the batch that is under way
            self.reference.update(self._unwrapped(), self.state.global_step)
        started = time.monotonic()
        total = torch.zeros((), device=self.args.device)
        batches = cut(pairs, self.args.updates_per_batch)
        for number, batch in enumerate(batches, start=1):
            own = batch[self.accelerator.process_index :: self.accelerator.num_processes]
            # Every process must take part in the collectives: one without pairs runs a stand-in that does not count.
            shared = PairList(own or batch[:1], is_stand_in=not own)
            total += self.run_pairs(model, shared, torch.tensor(len(batch), device=self.args.device))
            self.counts.updates += 1
            self.counts.lag += lag + number - 1  # updates since the responses were sampled
            if number < len(batches):
                self._step_optimizer(model)
        if self.ahead is not None:
            self.ahead.count_updates(len(batches))
        self._return_memory()
        self._last_tokens = sum(self.pair_forward.tokens(pair) for pair in pairs)
        self._time("update", started)
        return self.end_step(total / max(1, len(batches)))

    def _step_optimizer(self, model: Any) -> None:
        """Take an extra optimiser step within a Trainer step; the last one of a batch is taken by the Trainer itself."""
        self._get_grad_norm(model, self._clip_grad_norm(model) if self.args.max_grad_norm else None)
        self.optimizer.step()
        model.zero_grad()

    def _sample(self, prompts: Sequence[OnlinePrompt]) -> tuple[Any, int]:
        """Return the responses to this step's prompts, and the number of updates since they were sampled; begin with those of
        the next step if they are sampled ahead."""
        started, step = time.monotonic(), self.state.global_step
        taken = None if self.ahead is None else self.ahead.take(requests_of(prompts))
        if taken is None:  # the policy samples now, before its update
            self.reference.update(self._unwrapped(), step)
            responses, lag = self._respond(prompts, self._sampling(step)), 0
        else:
            responses, lag = taken.rows, taken.lag
        following = None if self._lookahead is None else self._lookahead.following
        if self.ahead is not None and following is not None and step + 1 < self.state.max_steps:
            if taken is not None:  # otherwise the sampler has the policy's weights already
                self.sampler.refresh()
            self.ahead.start(requests_of(prompts_of(following)), self._sampling(step + 1))
        self._time("generate", started)
        return responses, lag

    def _sampling(self, step: int) -> SamplingConfig:
        # The seed is derived from the step, so that a resumed run samples the same responses.
        seed = sample_seed(self.args.seed, "step", step) % 2**31
        return SamplingConfig(**self.args.sampling.as_dict() | {"stop": (), "seed": seed, "logprobs": True})

    def make_pairs(self, prompts: Sequence[OnlinePrompt], responses: Any) -> list[dict[str, Any]]:
        """Return the pairs of all processes with reference log-probs attached; every process gets all of them."""
        config, counts = self.args, self.counts
        started = time.monotonic()
        features = self.pair_maker.make(prompts, responses, counts, config.kept_prompts)
        if self.accelerator.is_main_process:
            step = self.state.global_step + 1
            keep_responses(Path(config.output_dir), step, self.pair_maker.kept, config.kept_steps)
        started = self._time("label", started)
        self._attach_reference_logps(features)
        self._time("reference", started)
        # All pairs everywhere, so that they can be divided evenly: prompts yield different numbers of pairs.
        pairs = gather_object(features) if self.accelerator.num_processes > 1 else features
        if config.baseline == "batch":
            columns = self.pair_maker.relative_columns()
            self.pair_maker.subtract_baseline(pairs, [pair[column] for column in columns for pair in pairs])
        return pairs

    def _respond(self, prompts: Sequence[OnlinePrompt], sampling: SamplingConfig) -> Any:
        """Return responses of the present weights, once no other batch is under way."""
        if self.ahead is not None:
            self.ahead.land()
        self.sampler.refresh()
        requests = requests_of(prompts)
        try:
            responses = self.sampler.respond(requests, sampling)
        except NotFiniteError as error:
            rows = [
                {"prompt_id": item.prompt_id, "input_ids": item.token_ids, "labels": item.token_ids}
                for item in requests
            ]
            raise self.failed(f"sampling found that {error},", rows, kind="sft") from error
        self._return_memory()
        return responses

    def _return_memory(self) -> None:
        """Return what this process has freed, after sampling and after the updates, which need blocks of other sizes."""
        if self.args.device.type == "cpu":
            self.kept_memory.end_phase(is_last_of_kind=True)

    def _time(self, what: str, started: float) -> float:
        now = time.monotonic()
        self.counts.seconds[what] = self.counts.seconds.get(what, 0.0) + now - started
        return now

    def _attach_reference_logps(self, features: list[dict[str, Any]]) -> None:
        """Add the reference's token log-probs (nats) to this process's pairs, before any update of the step."""
        if not self.args.loss.needs_reference or self.objective.reference_is_policy:
            return
        forward = replace(self.pair_forward, model=self._unwrapped())
        with forward.evaluation(), self.reference.in_place_of(forward.model):
            try:
                attach_reference_logps(forward, features, self.accelerator)
            except NotFiniteError as error:
                raise self.failed(str(error), error.rows) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy and, in a checkpoint, also the reference it is trained against and the batch that was sampled ahead."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir:
            self.reference.save(Path(output_dir), self._unwrapped(), self.args.should_save)
            if self.ahead is not None:
                self.ahead.save(Path(output_dir), self.args.should_save)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._evaluated = None  # other weights at the same step

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Answer the held-out prompts at every temperature; return and log mean scores, lengths and truncated fractions.

        The prompts are divided among the processes. The callbacks are informed. A second call at the same step returns the
        metrics of the first, which are those of the same weights. A response whose scoring fails is not part of the mean score;
        it is counted and named in a warning.
        """
        key = (metric_key_prefix, self.state.global_step)
        if self._evaluated is not None and self._evaluated[0] == key:
            return dict(self._evaluated[1])
        metrics = self._answer_held_out(metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._evaluated = (key, dict(metrics))
        return metrics

    def _answer_held_out(self, prefix: str) -> dict[str, float]:
        own = self.eval_dataset.prompts[self.accelerator.process_index :: self.accelerator.num_processes]
        metrics: dict[str, float] = {}
        for temperature in self.args.eval_temperatures:
            counts, samples, name = StepCounts(), self.args.samples_at(temperature), f"{prefix}_t{temperature:g}"
            sampling = SamplingConfig(
                num_samples=samples,
                temperature=temperature,
                max_new_tokens=self.args.max_new_tokens,
                seed=self.args.seed,
            )
            scores = self.pair_maker.score(own, self._respond(own, sampling), counts)
            metrics |= evaluation_log(reduced(counts, self.accelerator), name)
            if samples > 1:
                sums = summed(held_out_sums(scores, samples, self.args.eval_pass_score), self.accelerator)
                metrics |= pass_log(sums, samples, name)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the metrics of the responses since the last log together with those of the pairs."""
        if not any(name.startswith("eval_") for name in logs):
            total = reduced(self.counts, self.accelerator)
            self.counts = StepCounts()
            logs |= training_log(total)
        super().log(logs, start_time)


def prompts_of(inputs: PairList) -> list[OnlinePrompt]:
    """Return the prompts of a batch of this process; none of a stand-in."""
    return cast("list[OnlinePrompt]", [] if inputs.is_stand_in else inputs.features)


def requests_of(prompts: Sequence[OnlinePrompt]) -> list[PromptRequest]:
    """Return the requests for responses to some prompts."""
    return [PromptRequest(prompt.prompt_id, prompt.token_ids) for prompt in prompts]


def cut(pairs: Sequence[dict[str, Any]], parts: int) -> list[list[dict[str, Any]]]:
    """Split pairs into at most ``parts`` consecutive batches of nearly equal size; none is empty."""
    bounds = [round(number * len(pairs) / parts) for number in range(parts + 1)]
    return [list(pairs[first:last]) for first, last in pairwise(bounds) if last > first]
