"""What needs vLLM: generation against the bare engine, an online step beside a colocated engine, sleeping engines."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import Findings, synchronize, timed
from benchmarks.shapes import EOS_ID, FIRST_WORD_ID, MODELS, PAD_ID, make_model, make_tokenizer
from spin.alignment.core.files import read_json

MODEL, MEMORY_SHARE, CONTEXT = "0.5b", 0.3, 512
PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS, TURNS = 64, 128, 128, 3
TINY_PROMPTS, TINY_RESPONSE_TOKENS = 4, 8


def measure_generation(findings: Findings) -> None:
    """Record a run of ``benchmarks/generate.py``: our generation step on vLLM against the engine alone."""
    from benchmarks import generate

    sizes = ("--prompts", "8", "--reps", "1") if findings.tiny else ("--prompts", "1024", "--dtype", "bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        code = generate.main(["--contenders", "bare_vllm", "vllm", "--gather_rows", "0", "--out", str(out), *sizes])
        for name, value in read_json(out).items():
            findings.add(name, value)
    if code:
        raise RuntimeError("the contenders do not compare: see contenders and vllm_same_responses")


def measure_online_step(findings: Findings) -> None:
    """Record the turns of online training with an engine on the same device: weight update, responses, optimiser step."""
    from benchmarks.gpu.steps import Case, StepTrainer
    from spin.alignment.generation import make_backend
    from spin.alignment.generation.base import BackendSettings
    from spin.alignment.training.online.samplers import EngineSampler, save_weights

    with tempfile.TemporaryDirectory() as folder:
        model = save_policy(Path(folder), findings)
        before = free_bytes(findings.device)
        settings = BackendSettings(
            folder,
            dtype="float32" if findings.tiny else "bfloat16",
            gpu_memory_utilization=MEMORY_SHARE,
            max_model_len=CONTEXT,
            stop_ids=[EOS_ID],
            pad_id=PAD_ID,
        )
        seconds, backend = timed(findings.device, partial(make_backend, "vllm", settings))
        findings.add("engine", {"start_seconds": seconds, "taken_bytes": before - free_bytes(findings.device)})
        sampler = EngineSampler(backend, partial(save_weights, model))
        try:
            weights = "float32" if findings.tiny else "bfloat16"
            trainer = StepTrainer(model, Case(MODEL, weights=weights, optimizer="rmsprop"), findings.device)
            for turn in range(2 if findings.tiny else TURNS):
                findings.add(f"turn {turn}", online_turn(sampler, trainer, findings, turn))
        finally:
            sampler.close()


def save_policy(folder: Path, findings: Findings) -> Any:
    """Save a random policy with its tokenizer to a folder; return it on the device."""
    from transformers import AutoModelForCausalLM

    from benchmarks.generation_data import save_model

    if findings.tiny:
        save_model(folder, seed=0)
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="sdpa")
    model = make_model(MODELS[MODEL], CONTEXT, 0, findings.device, "bfloat16")
    model.save_pretrained(folder)
    make_tokenizer(MODELS[MODEL].vocab_size).save_pretrained(folder)
    return model


def online_turn(sampler: Any, trainer: Any, findings: Findings, turn: int) -> dict[str, Any]:
    """Update the engine's weights, sample two responses to each prompt, take one step on them; return the seconds of each."""
    from spin.alignment.generation.base import SamplingConfig

    prompts = make_requests(TINY_PROMPTS if findings.tiny else PROMPTS, turn)
    longest = TINY_RESPONSE_TOKENS if findings.tiny else RESPONSE_TOKENS
    sampling = SamplingConfig(num_samples=2, max_new_tokens=longest)
    device = findings.device
    updating, _ = timed(device, sampler.refresh)
    generating, responses = timed(device, partial(sampler.respond, prompts, sampling))
    pairs = make_pairs(prompts, responses)
    scoring, _ = timed(device, partial(trainer.add_reference, pairs))
    training, loss = timed(device, partial(trainer.step, pairs))
    tokens = sum(len(response.token_ids) for each in responses for response in each)
    return {
        "weight_update_seconds": updating,
        "generation_seconds": generating,
        "generated_tokens_per_second": tokens / generating,
        "reference_seconds": scoring,
        "step_seconds": training,
        "loss": loss,
        "free_bytes": free_bytes(device),
    }


def make_requests(count: int, turn: int) -> list[Any]:
    """Return random prompts of ``PROMPT_TOKENS`` tokens; their words exist in every vocabulary used here."""
    import numpy as np

    from spin.alignment.generation.base import PromptRequest

    ids = np.random.default_rng(turn).integers(FIRST_WORD_ID, 500, (count, PROMPT_TOKENS))
    return [PromptRequest(f"turn{turn}-{number}", row) for number, row in enumerate(ids.tolist())]


def make_pairs(prompts: Sequence[Any], responses: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Return a pair per prompt: its first response is chosen, its second rejected."""
    return [
        {
            "prompt_ids": list(prompt.token_ids),
            "chosen_ids": list(first.token_ids),
            "rejected_ids": list(second.token_ids),
        }
        for prompt, (first, second) in zip(prompts, responses, strict=True)
    ]


def measure_sleep(findings: Findings) -> None:
    """Record the free memory of the GPU around vLLM's sleep modes (1: weights moved to the CPU, 2: discarded), and seconds.

    This is the engine's own ability; the project does not put its engine to sleep.
    """
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        save_policy(Path(folder), findings)
        findings.add("free_bytes_before", free_bytes(findings.device))
        engine = LLM(model=folder, max_model_len=CONTEXT, gpu_memory_utilization=MEMORY_SHARE, enable_sleep_mode=True)
        findings.add("free_bytes_with_engine", free_bytes(findings.device))
        for level in (1, 2):
            falling, _ = timed(findings.device, partial(engine.sleep, level=level))
            asleep = free_bytes(findings.device)
            waking, _ = timed(findings.device, engine.wake_up)
            found = {"sleep_seconds": falling, "free_bytes": asleep, "wake_seconds": waking}
            findings.add(f"level {level}", found | {"free_bytes_awake": free_bytes(findings.device)})


def free_bytes(device: str) -> int:
    """Return the free memory of the GPU, whoever uses the rest; without a GPU that of the machine."""
    import psutil
    import torch

    synchronize(device)
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
