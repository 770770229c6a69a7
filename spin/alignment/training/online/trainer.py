"""OnlineTrainer: a step draws responses, labels and pairs them, and updates the policy against a reference of its own past."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from spin.alignment.core.errors import InputError
from spin.alignment.generation.base import PromptRequest, SamplingConfig, sample_seed
from spin.alignment.logprobs.batch import PairDataset, PairList
from spin.alignment.logprobs.forward import batch_logps
from spin.alignment.training.online.config import OnlineConfig
from spin.alignment.training.online.labels import PairMaker, StepCounts
from spin.alignment.training.online.prompts import OnlinePrompt, PromptDataset
from spin.alignment.training.online.samplers import PolicySampler
from spin.alignment.training.trainer import SPINTrainer

REFERENCE_FILE = "reference.safetensors"
_SUMMED = (
    *("prompts", "responses", "tokens", "truncated", "scored", "score_sum", "failed", "without_pair", "unpaired"),
    "pairs",
)
_TIMED = ("generate", "label", "reference", "update")


class OnlineTrainer(SPINTrainer):
    """The Trainer's step is one batch of prompts; checkpoints, resume, schedules and logs are the Trainer's own.

    The reference is the policy at the last step whose number ``ref_update_freq`` divides. With 1 it is the policy that
    sampled, and nothing is kept; else a copy of the trained weights is, and it is stored in every checkpoint.
    """

    args: OnlineConfig

    def __init__(
        self,
        model: Any,
        args: OnlineConfig,
        train_dataset: PromptDataset,
        processing_class: Any,
        opponent_hash: str,
        pair_maker: PairMaker,
        eval_dataset: PromptDataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.pair_maker = pair_maker
        self.sampler: PolicySampler | None = None
        self.counts = StepCounts()
        self._last_tokens = 0
        self._kept: dict[str, torch.Tensor] | None = None
        self._resumed_from: Path | None = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,  # type: ignore[arg-type]
            eval_dataset=eval_dataset,  # type: ignore[arg-type]
            processing_class=processing_class,
            opponent_hash=opponent_hash,
            callbacks=callbacks,
        )

    def train(self, resume_from_checkpoint: Any = None, **settings: Any) -> Any:
        """Train; see ``transformers.Trainer.train``. The sampler must have been set."""
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **settings)

    def attach_references(self, resumed: bool) -> None:
        """Check packed rows and plan the token budget on stand-ins of the longest pairs; take up the stored reference.

        Raises:
            InputError: a resumed run has lost its reference.
        """
        self.prepare_batching(self.stand_ins(), resumed)
        if self.args.ref_update_freq > 1 and resumed:
            assert self._resumed_from is not None
            path = self._resumed_from / REFERENCE_FILE
            if not path.exists():
                raise InputError(
                    f"{path} is gone, so the run cannot go on exactly: restore it, or remove the checkpoint {path.parent}"
                )
            self._kept = {name: value.to(self.args.device) for name, value in load_file(path).items()}

    def stand_ins(self) -> PairDataset:
        """Return pairs as long as any step can make them: what memory is planned for."""
        prompts = self.train_dataset.prompts
        longest = sorted((prompt.token_ids for prompt in prompts), key=len)[-64:]
        response = max(self.args.max_new_tokens, *(len(prompt.truth_ids) for prompt in prompts))
        end = [self.processing_class.eos_token_id] * response
        rows = [{"prompt_ids": list(ids), "chosen_ids": end, "rejected_ids": end} for ids in longest]
        return PairDataset(Dataset.from_list(rows))

    def floating_point_ops(self, inputs: PairList) -> float:
        """Return about how many operations the last update cost: 6 per weight and token."""
        return 6.0 * sum(parameter.numel() for parameter in self.model.parameters()) * self._last_tokens

    def longest_pair(self) -> int:
        """Return the most tokens a pair may have."""
        return max(self.batcher.collator.tokens(row) for row in self.stand_ins().rows)

    def training_step(
        self, model: Any, inputs: PairList, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Make the pairs of a batch of prompts and update the policy on them, ``updates_per_batch`` times."""
        if self.args.ref_update_freq > 1 and self.state.global_step % self.args.ref_update_freq == 0:
            self._kept = {name: weight.detach().clone() for name, weight in self._trained()}
        pairs = self.make_pairs(cast("list[OnlinePrompt]", inputs.features))
        started = time.monotonic()
        total = torch.zeros((), device=self.args.device)
        batches = cut(pairs, self.args.updates_per_batch)
        for number, batch in enumerate(batches, start=1):
            own = batch[self.accelerator.process_index :: self.accelerator.num_processes]
            # A process without a pair of its own keeps the others company with one that does not count.
            shared = PairList(own or batch[:1], stands_in=not own)
            total += super().training_step(model, shared, torch.tensor(len(batch), device=self.args.device))
            if number < len(batches):
                self._step_optimizer(model)
        self._last_tokens = sum(self.batcher.collator.tokens(pair) for pair in pairs)
        self._time("update", started)
        return total / max(1, len(batches))

    def _step_optimizer(self, model: Any) -> None:
        """Take an optimiser step inside the Trainer's; the last one of a batch is the Trainer's own."""
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        model.zero_grad()

    def make_pairs(self, prompts: Sequence[OnlinePrompt]) -> list[dict[str, Any]]:
        """Return the pairs of all processes' prompts, the reference's log-probs attached; every process gets all."""
        config, counts = self.args, self.counts
        started = time.monotonic()
        seed = sample_seed(config.seed, "step", self.state.global_step) % 2**31
        sampling = SamplingConfig(**config.sampling.as_dict() | {"stop": (), "seed": seed})
        responses = self._respond(prompts, sampling)
        started = self._time("generate", started)
        features = self.pair_maker.make(prompts, responses, counts)
        started = self._time("label", started)
        self._attach_reference_logps(features)
        self._time("reference", started)
        pairs = gather_object(features) if self.accelerator.num_processes > 1 else features
        if config.baseline == "batch":
            columns = self.pair_maker.relative_columns()
            self.pair_maker.subtract_baseline(pairs, [pair[column] for column in columns for pair in pairs])
        return pairs

    def _respond(self, prompts: Sequence[OnlinePrompt], sampling: SamplingConfig) -> Any:
        assert self.sampler is not None
        self.sampler.refresh()
        requests = [PromptRequest(prompt.prompt_id, prompt.token_ids) for prompt in prompts]
        return self.sampler.respond(requests, sampling)

    def _time(self, what: str, started: float) -> float:
        now = time.monotonic()
        self.counts.seconds[what] = self.counts.seconds.get(what, 0.0) + now - started
        return now

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        model = self.accelerator.unwrap_model(self.model_wrapped)
        return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]

    @contextlib.contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """Let the policy's module compute with the reference's weights: two pointers change places, and back."""
        if self._kept is None:
            yield
            return
        pairs = [(weight, self._kept[name]) for name, weight in self._trained()]
        own = [weight.data for weight, _ in pairs]
        for weight, kept in pairs:
            weight.data = kept
        try:
            yield
        finally:
            for (weight, _), data in zip(pairs, own, strict=True):
                weight.data = data

    @torch.no_grad()
    def _attach_reference_logps(self, features: list[dict[str, Any]]) -> None:
        """Put the reference's token log-probs (nats) on this process's pairs, before any update of the step."""
        if not self.args.loss.needs_reference:
            return
        model = self.accelerator.unwrap_model(self.model_wrapped)
        model.eval()
        with self._reference_weights(), self.compute_loss_context_manager():
            for indices in self.batcher.plan(features):
                batch = self.batcher.collate(features, indices, self.args.device).batch
                logps = [response.numpy() for response in batch_logps(model, batch)]
                for place, index in enumerate(indices):
                    features[index]["chosen_reference"] = logps[place]
                    features[index]["rejected_reference"] = logps[len(indices) + place]
        model.train()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy and, beside it in a checkpoint, the reference it is trained against."""
        super().save_model(output_dir, _internal_call)
        if self._kept is not None and _internal_call and output_dir and self.args.should_save:
            kept = {name: value.contiguous().cpu() for name, value in self._kept.items()}
            save_file(kept, Path(output_dir) / REFERENCE_FILE)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Answer the held-out prompts at every temperature; return mean scores, lengths and cut responses, and log them.

        Every process answers a share.
        """
        own = self.eval_dataset.prompts[self.accelerator.process_index :: self.accelerator.num_processes]
        metrics: dict[str, float] = {}
        for temperature in self.args.eval_temperatures:
            counts = StepCounts()
            sampling = SamplingConfig(
                temperature=temperature, max_new_tokens=self.args.max_new_tokens, seed=self.args.seed
            )
            self.pair_maker.label(own, self._respond(own, sampling), counts)
            total = self._reduced(counts)
            prefix = f"{metric_key_prefix}_t{temperature:g}"
            metrics[f"{prefix}_score"] = total["score_sum"] / max(1.0, total["scored"])
            metrics[f"{prefix}_length"] = total["tokens"] / max(1.0, total["responses"])
            metrics[f"{prefix}_truncated"] = total["truncated"] / max(1.0, total["responses"])
        self.log(dict(metrics))
        return metrics

    def _reduced(self, counts: StepCounts) -> dict[str, float]:
        """Return the sums over all processes, and the seconds of the slowest part of each. Every process must call it."""
        values = [float(getattr(counts, name)) for name in _SUMMED]
        values += [counts.seconds.get(name, 0.0) / self.accelerator.num_processes for name in _TIMED]
        local = torch.tensor(values, dtype=torch.float32, device=self.args.device)
        total = self.accelerator.reduce(local, reduction="sum").tolist()
        return dict(zip((*_SUMMED, *(f"{name}_seconds" for name in _TIMED)), total, strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the responses were like since the last log beside what is logged about pairs."""
        if not any(name.startswith("eval_") for name in logs):
            total = self._reduced(self.counts)
            self.counts = StepCounts()
            if total["responses"]:
                logs |= {
                    "score": total["score_sum"] / max(1.0, total["scored"]),
                    "pairs_per_prompt": total["pairs"] / total["prompts"],
                    "without_pair": total["without_pair"] / total["prompts"],
                    "failed_scores": total["failed"],
                    "unpaired": total["unpaired"],
                    "response_length": total["tokens"] / total["responses"],
                    "truncated": total["truncated"] / total["responses"],
                    **{f"seconds/{name}": total[f"{name}_seconds"] for name in _TIMED},
                }
        super().log(logs, start_time)


def cut(pairs: Sequence[dict[str, Any]], parts: int) -> list[list[dict[str, Any]]]:
    """Cut pairs into at most ``parts`` neighbouring batches of nearly the same size; none is empty."""
    bounds = [round(number * len(pairs) / parts) for number in range(parts + 1)]
    return [list(pairs[first:last]) for first, last in pairwise(bounds) if last > first]
