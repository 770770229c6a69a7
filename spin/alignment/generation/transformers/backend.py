"""Generation with transformers models: continuous batching, with random numbers that do not depend on the batch."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from spin.alignment.core.allocator import KeptMemory, keep_freed_memory
from spin.alignment.core.errors import InputError
from spin.alignment.generation.base import GenerationBackend, PromptRequest, Response, SamplingConfig
from spin.alignment.generation.transformers.decoder import Decoder, takes_ragged_rows, without_gradients
from spin.alignment.generation.transformers.jobs import Job, Request
from spin.alignment.generation.transformers.kv_cache import RowCache, layer_windows
from spin.alignment.generation.transformers.stop_texts import StopTextWatcher
from spin.alignment.models.adapters import check_adapter
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.loading import load_model
from spin.alignment.models.positions import fixed_positions
from spin.alignment.models.precision import decoding_dtype

if TYPE_CHECKING:
    from spin.alignment.generation.base import BackendSettings


DEFAULT_BATCH_SIZE = 64
# Share of the free memory for keys and values: buffers are up to a quarter larger than their content, a buffer being
# reallocated exists twice, and a prefill needs its own.
_CACHE_SHARE = 0.5


def _own_device() -> torch.device:
    """The GPU of this process within a launch, otherwise the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


class TransformersBackend(GenerationBackend):
    """One model, held from construction to :meth:`close`."""

    def __init__(self, settings: BackendSettings, model: Any = None, forward: Callable[..., Any] | None = None) -> None:
        """Load ``settings.model`` and its adapter, or use the given ``model`` (evaluation scores the same weights), which
        ``forward`` runs (default: the model itself; a sharded one is called through its wrapper).

        Raises:
            InputError: the model has state other than keys and values, or the adapter does not fit it.
        """
        self.settings = settings
        self.model = (_load(settings) if model is None else model).eval()
        self._forward = forward or self.model
        self._windows = layer_windows(self.model)
        self._kept_memory = KeptMemory() if self.model.device.type == "cpu" else None
        if "position_ids" not in inspect.signature(type(self.model).forward).parameters:
            name = type(self.model).__name__
            raise InputError(
                f"{name} does not accept position_ids, so the transformers backend cannot run it: use --backend vllm"
            )
        with without_gradients(self.model)():
            self._bytes_per_token = self._probe()

    def _probe(self) -> int:
        """Run one token through the model; return the size of its keys and values in bytes.

        Raises:
            InputError: a layer did not store its keys and values in the cache.
        """
        cache, place = RowCache(self._windows), torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        fault: Exception | None = None
        try:
            token, mask = place + self.settings.pad_id, place + 1
            self._forward(
                input_ids=token, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True
            )
        except (AttributeError, TypeError, KeyError, IndexError, ValueError) as error:
            fault = error
        if fault is not None or any(layer.width != 1 for layer in cache.layers):
            raise InputError(
                f"{type(self.model).__name__} does not use the key-value cache passed to it, so the transformers "
                "backend cannot run it: use --backend vllm"
            ) from fault
        self._ragged = takes_ragged_rows(self.model, self._windows, self._forward)
        return sum(buffer.nbytes for layer in cache.layers for buffer in layer.buffers or ())

    def stream(
        self, requests: Iterable[PromptRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        """Yield ``(n, responses)`` for the n-th request once all are finished; at most one request waits besides those in flight.

        Raises:
            ValueError: a request is empty or has no limit, or stop texts are given without ``settings.decode``.
            InputError: a request reaches positions at which the model's rotary embedding would depend on the rest of the batch.
        """
        most = self.settings.batch_size or DEFAULT_BATCH_SIZE
        settings = self.settings
        decoder = Decoder(
            self.model,
            self._windows,
            sampling,
            settings.pad_id,
            most,
            self._ragged,
            settings.masked_ids,
            self._forward,
        )
        queue = _Queue(
            requests, sampling, settings, fixed_positions(self.model.config.get_text_config(decoder=True).to_dict())
        )
        columns = self._columns()
        # The fraction of a full batch that was empty, summed over steps. A forward pass for few rows costs about as much as one
        # for many, so when it reaches 1 the empty rows have cost as much as the prefill that would fill them.
        idle, full = 0.0, 1
        while True:
            idle += 1.0 - len(decoder.jobs) / full
            ended: list[Job] = []
            if not decoder.jobs or idle >= 1.0:
                if self._kept_memory is not None:
                    self._kept_memory.end_phase()
                ended += decoder.add(queue.take(decoder.jobs, most, columns))
                idle, full = 0.0, max(1, len(decoder.jobs))
            if not decoder.jobs and not ended:
                return
            if decoder.jobs:
                # No memory for the next column: an evicted response is resumed later from its tokens so far.
                while len(decoder.jobs) > 1 and len(decoder.jobs) * (decoder.cache.width + 1) > columns:
                    queue.put_back(decoder.evict())
                ended += decoder.step()
            # Several samples of a request may end in the same step.
            for request in {job.request.number: job.request for job in ended if job.request.is_done}.values():
                yield request.number, [response for response in request.responses if response is not None]

    def _columns(self) -> int:
        """Return how many tokens, including padding, fit in the caches of all rows together."""
        device = self.model.device
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
            free -= torch.cuda.memory_allocated(device)
        else:
            free = psutil.virtual_memory().available
        return int(_CACHE_SHARE * free / self._bytes_per_token)

    def close(self) -> None:
        """Free the model and the device memory."""
        del self.model, self._forward
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Queue:
    """Pending responses: evicted ones first, then samples of the request taken last, then new requests."""

    def __init__(
        self,
        requests: Iterable[PromptRequest],
        sampling: SamplingConfig,
        settings: BackendSettings,
        positions: int | None,
    ) -> None:
        if sampling.stop and settings.decode is None:
            raise ValueError("stop texts need settings.decode, which turns ids into text")
        self._source = enumerate(requests)
        self._sampling, self._settings, self._positions = sampling, settings, positions
        self._stop_ids = frozenset(settings.stop_ids)
        self._waiting: deque[Job] = deque()

    def take(self, running: list[Job], most: int, columns: int) -> list[Job]:
        """Return the next jobs that fit in addition to the running ones: at most ``most`` rows and about ``columns`` tokens."""
        taken: list[Job] = []
        reach = max((job.reach for job in running), default=0)
        while (rows := len(running) + len(taken) + 1) <= most and (self._waiting or self._draw()):
            reach = max(reach, self._waiting[0].reach)
            if rows > 1 and rows * reach > columns:
                break
            taken.append(self._waiting.popleft())
        return taken

    def put_back(self, job: Job) -> None:
        """Put an evicted response at the front of the queue."""
        self._waiting.appendleft(job)

    def _draw(self) -> bool:
        """Queue the samples of the next request; return False if there is none."""
        number, prompt = next(self._source, (-1, None))
        if prompt is None:
            return False
        if not len(prompt.token_ids):
            raise ValueError(f"prompt {prompt.prompt_id} is empty: give it at least one token")
        limit = self._sampling.longest(prompt)
        if self._positions is not None and len(prompt.token_ids) + limit > self._positions:
            raise InputError(
                f"prompt {prompt.prompt_id} with {limit} new tokens exceeds position {self._positions}, where this model's "
                "rotary embedding depends on the longest row of a batch: lower max_new_tokens, or use --backend vllm"
            )
        count = self._sampling.num_samples
        request = Request(number, prompt, limit, [None] * count)
        for sample in range(count):
            watcher = None
            if self._sampling.stop and self._settings.decode is not None:
                watcher = StopTextWatcher(self._sampling.stop, self._settings.decode)
            self._waiting.append(Job(request, sample, self._sampling, self._stop_ids, watcher))
        return True


def _load(settings: BackendSettings) -> Any:
    """Load the model in the settings with its adapter on this process's device."""
    device = _own_device()
    if device.type == "cpu":
        keep_freed_memory()
    config = ModelConfig(
        model_name_or_path=settings.model,
        model_revision=settings.revision,
        dtype=decoding_dtype(settings.model, settings.revision, settings.dtype),
        trust_remote_code=settings.trust_remote_code,
    )
    model = load_model(config)
    if settings.adapter is not None:
        model = _with_adapter(model, settings.adapter)
    return model.to(device)


def _with_adapter(model: Any, folder: str) -> Any:
    """Return the model with LoRA adapters: merged in float32, unmerged in half precision, which would round them away.

    Raises:
        InputError: peft is missing, the folder contains no LoRA adapter, or the adapter is for another model.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError("an adapter needs the peft package: pip install 'selfplay-spin[peft]'")
    if not (Path(folder) / "adapter_config.json").is_file():
        raise InputError(f"adapter folder {folder} contains no adapter_config.json: give the folder of a saved adapter")
    from peft import PeftModel

    name = str(getattr(model.config, "name_or_path", "") or folder)
    check_adapter(Path(folder), Path(name), model.config)  # peft only warns of missing weights
    adapted = PeftModel.from_pretrained(model, folder)
    if next(model.parameters()).dtype == torch.float32:
        return adapted.merge_and_unload()
    return adapted.get_base_model()
