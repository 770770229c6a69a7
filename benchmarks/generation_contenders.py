"""The contenders of the generation benchmark: this project's step on two backends, the engine alone, the original's loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.generation_data import SPLIT, Prompt
from spin.alignment.generation import make_backend
from spin.alignment.generation.base import (
    BackendSettings,
    GenerationBackend,
    PromptRequest,
    Response,
    SamplingConfig,
    sample_seed,
)

if TYPE_CHECKING:
    from benchmarks.generation_process import Task
    from spin.alignment.data.chat_encoder import ChatEncoder

ORIGINAL_BATCH = 16
# A share of the device's memory, so that several waiting engines fit on one GPU.
MEMORY_SHARE = 0.3


class Contender(ABC):
    """A loaded model that answers prompts, one turn after the other; ``prompts`` are those of the last prepared turn."""

    prompts: list[Prompt]

    @abstractmethod
    def prepare(self, turn: int) -> None:
        """Prepare the prompts of a turn; not timed."""

    @abstractmethod
    def work(self) -> None:
        """Answer them; this is what is timed."""

    @abstractmethod
    def responses(self) -> dict[str, list[int]]:
        """Return the sampled ids of each prompt, up to and including the stop id."""

    @abstractmethod
    def close(self) -> None:
        """Free the model and end the engine."""


def backend_settings(task: Task, encoder: ChatEncoder) -> BackendSettings:
    return BackendSettings(
        model=task.model_folder,
        dtype=task.dtype,
        max_model_len=task.max_model_len,
        gpu_memory_utilization=MEMORY_SHARE,
        stop_ids=encoder.stop_ids,
        pad_id=encoder.pad_id,
        decode=encoder.decode,
    )


class Bare(Contender):
    """vLLM's own ``LLM.generate``, called once with the ids of all prompts; the engine is set up as by our backend."""

    def __init__(self, task: Task) -> None:
        self.task, self._encoder = task, task.encoder()
        self._backend: Any = make_backend("vllm", backend_settings(task, self._encoder))

    def prepare(self, turn: int) -> None:
        from vllm import SamplingParams

        self.prompts = self.task.turn_prompts(turn, self._encoder)
        self._inputs = [{"prompt_token_ids": prompt.token_ids} for prompt in self.prompts]
        self._parameters = [
            SamplingParams(
                temperature=1.0,
                max_tokens=self.task.max_new_tokens,
                seed=sample_seed(self.task.seed, prompt.prompt_id, 0),
                stop_token_ids=self._encoder.stop_ids,
                ignore_eos=True,
                detokenize=False,
            )
            for prompt in self.prompts
        ]

    def work(self) -> None:
        self._outputs = self._backend.engine.generate(self._inputs, self._parameters, use_tqdm=False)

    def responses(self) -> dict[str, list[int]]:
        pairs = zip(self.prompts, self._outputs, strict=True)
        return {prompt.prompt_id: list(output.outputs[0].token_ids) for prompt, output in pairs}

    def close(self) -> None:
        self._backend.close()


class _Lasting(GenerationBackend):
    """A backend that stays loaded after the runs that use it."""

    def __init__(self, backend: GenerationBackend) -> None:
        self.backend = backend

    def stream(
        self, requests: Iterable[PromptRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        return self.backend.stream(requests, sampling)

    def close(self) -> None:
        """Do nothing: the next turn uses the backend again."""


class OurStep(Contender):
    """The work of spin/generate.py with a loaded model: encode, claim, generate, decode, write parts, merge the fraction."""

    def __init__(self, task: Task, backend: str) -> None:
        self.task, self.backend_name, self._encoder = task, backend, task.encoder()
        self._backend = _Lasting(make_backend(backend, backend_settings(task, self._encoder)))

    def prepare(self, turn: int) -> None:
        from spin.alignment.data.fractions import PARTS_FOLDER
        from spin.alignment.generation import generate
        from spin.alignment.generation.config import GenerateConfig
        from spin.alignment.generation.leases import Worker
        from spin.alignment.generation.progress import GenerationProgress
        from spin.alignment.generation.worker import GenerationRun

        self.prompts = self.task.turn_prompts(turn, self._encoder)
        self._output = Path(self.task.folder) / f"turn-{turn}"
        config = GenerateConfig(
            model=self.task.model_folder,
            input_dir=self.task.turn_data(turn),
            output_dir=str(self._output),
            split=SPLIT,
            backend=self.backend_name,
            dtype=self.task.dtype,
            max_new_tokens=self.task.max_new_tokens,
            seed=self.task.seed,
        )
        stated = generate.expected_provenance(config, Path(config.model))
        self._open = ExitStack()
        worker = self._open.enter_context(Worker(self._output / PARTS_FOLDER / "workers"))
        model_config, encoder = generate.open_model(config, Path(config.model))
        self._job = generate.make_job(config, stated, model_config, encoder, worker)
        progress = GenerationProgress("fraction 0")
        self._run = GenerationRun(self._job, [0], worker, lambda _: self._backend, config.prompts_in_part, progress)

    def work(self) -> None:
        self._run.run()

    def responses(self) -> dict[str, list[int]]:
        import pyarrow.parquet as pq

        from spin.alignment.data.fractions import fraction_path
        from spin.alignment.generation.fraction_journal import clear_parts

        self._open.close()
        clear_parts(self._output, SPLIT, len(self._job.store), 0)
        table = pq.read_table(fraction_path(self._output, SPLIT, 0))
        ids = table["rejected_token_ids"].to_pylist()
        return dict(zip(table["prompt_id"].to_pylist(), ids, strict=True))

    def close(self) -> None:
        self._backend.backend.close()


class Original(Contender):
    """The loop of the original program: batches of 16 in data order, left-padded, ``model.generate``, ``batch_decode``."""

    def __init__(self, task: Task) -> None:
        import torch
        from transformers import AutoTokenizer

        from benchmarks.shapes import load_model

        self.task, self._encoder = task, task.encoder()
        self._model = (
            load_model(task.model_folder, task.dtype).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        )
        self._tokenizer = AutoTokenizer.from_pretrained(task.model_folder, padding_side="left")

    def prepare(self, turn: int) -> None:
        import torch

        torch.manual_seed(self.task.seed + turn)
        self.prompts = self.task.turn_prompts(turn, self._encoder)
        self._texts = [self._tokenizer.decode(prompt.token_ids) for prompt in self.prompts]
        self._sampled: list[list[int]] = []
        self._answers: list[str] = []

    def work(self) -> None:
        for begin in range(0, len(self._texts), ORIGINAL_BATCH):
            texts = self._texts[begin : begin + ORIGINAL_BATCH]
            inputs = self._tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
            ids, mask = (inputs[name].to(self._model.device) for name in ("input_ids", "attention_mask"))
            # The library's default for top_k is 50.
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.task.max_new_tokens,
                pad_token_id=self._encoder.pad_id,
            )
            new = output[:, ids.shape[1] :]
            self._answers += self._tokenizer.batch_decode(new, skip_special_tokens=True)
            self._sampled += new.tolist()

    def responses(self) -> dict[str, list[int]]:
        pairs = zip(self.prompts, self._sampled, strict=True)
        return {prompt.prompt_id: real_tokens(ids, self._encoder.stop_ids) for prompt, ids in pairs}

    def close(self) -> None:
        del self._model


def real_tokens(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Return sampled ids without the padding after the first stop id."""
    ends = [place for place, token in enumerate(ids) if token in stop_ids]
    return ids[: ends[0] + 1] if ends else ids


@dataclass(frozen=True)
class Entrant:
    """``start(task)`` loads the model of a contender."""

    label: str
    start: Callable[[Task], Contender]


CONTENDERS = {
    "bare_vllm": Entrant("vLLM engine alone", Bare),
    "vllm": Entrant("this project on vLLM", partial(OurStep, backend="vllm")),
    "transformers": Entrant("this project on transformers", partial(OurStep, backend="transformers")),
    "original": Entrant("original loop on transformers", Original),
}
