"""Generation by transformers: length-sorted, left-padded batches, and random numbers that no batching can change."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spin.alignment.configs import ModelConfig
from spin.alignment.generation.base import PromptRequest, Response, SamplingConfig, sample_seed
from spin.alignment.model_utils import load_model

if TYPE_CHECKING:
    from spin.alignment.generation import BackendSettings


DEFAULT_BATCH_SIZE = 16


def _own_device() -> torch.device:
    """The GPU of this process of a launch, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


class SeededDraw(LogitsProcessor):
    """Draw each row's next token by inverse CDF from a stream of its own, and leave only that token possible.

    ``uniforms`` has shape ``(B, max_new_tokens)``: row b, step s is the s-th number of the Philox stream keyed by that
    response's seed, so a response depends on (seed, prompt id, sample index) and on nothing else in the batch.
    """

    def __init__(self, uniforms: torch.Tensor, prompt_length: int) -> None:
        self.uniforms, self.prompt_length = uniforms, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
        targets = self.uniforms[:, step : step + 1] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, targets, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)


class TransformersBackend:
    """One model, held from construction to :meth:`close`."""

    def __init__(self, settings: BackendSettings, model: Any = None) -> None:
        """Load ``settings.model``, or use a ``model`` that is loaded already (evaluation scores it with the same weights)."""
        self.settings = settings
        if model is None:
            device = _own_device()
            config = ModelConfig(
                model_name_or_path=settings.model,
                model_revision=settings.revision,
                dtype=settings.dtype,
                trust_remote_code=settings.trust_remote_code,
            )
            model = load_model(config).to(device)
        self.model = model.eval()
        # The model's own sampling defaults must not leak in: the sampling specification is complete by itself.
        self.model.generation_config = GenerationConfig()

    def generate(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> list[list[Response]]:
        """Return ``num_samples`` responses for each request, in the order of the requests."""
        jobs = [(row, sample) for row in range(len(requests)) for sample in range(sampling.num_samples)]
        jobs.sort(key=lambda job: len(requests[job[0]].token_ids))
        results: list[list[Response | None]] = [[None] * sampling.num_samples for _ in requests]
        size = self.settings.batch_size or DEFAULT_BATCH_SIZE
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            responses = self._generate_batch([(requests[row], sample) for row, sample in batch], sampling)
            for (row, sample), response in zip(batch, responses, strict=True):
                results[row][sample] = response
        return [[response for response in row if response is not None] for row in results]

    @torch.inference_mode()
    def _generate_batch(self, batch: list[tuple[PromptRequest, int]], sampling: SamplingConfig) -> list[Response]:
        width = max(len(request.token_ids) for request, _ in batch)
        input_ids = torch.full((len(batch), width), self.settings.pad_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, (request, _) in enumerate(batch):
            input_ids[row, width - len(request.token_ids) :] = torch.tensor(request.token_ids)
            attention_mask[row, width - len(request.token_ids) :] = 1
        device = self.model.device
        output = self.model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            logits_processor=self._processors(batch, sampling, width),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=self.settings.stop_ids,
                pad_token_id=self.settings.pad_id,
            ),
        )
        return [self._cut(ids) for ids in output[:, width:].tolist()]

    def _processors(
        self, batch: list[tuple[PromptRequest, int]], sampling: SamplingConfig, width: int
    ) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        if sampling.temperature == 0.0:
            return processors
        if sampling.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            processors.append(TopPLogitsWarper(sampling.top_p))
        seeds = [sample_seed(sampling.seed, request.prompt_id, sample) for request, sample in batch]
        streams = [np.random.Generator(np.random.Philox(key=seed)).random(sampling.max_new_tokens) for seed in seeds]
        processors.append(SeededDraw(torch.from_numpy(np.stack(streams)).to(self.model.device), width))
        return processors

    def _cut(self, ids: list[int]) -> Response:
        for position, token in enumerate(ids):
            if token in self.settings.stop_ids:
                return Response(ids[: position + 1], "stop")
        return Response(ids, "length")

    def close(self) -> None:
        """Free the model and the device memory."""
        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
