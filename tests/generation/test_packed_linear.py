"""Linear layers with packed weights against torch's own, and the transformers backend with them against the library."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spin.alignment.generation import PromptRequest, SamplingConfig
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.transformers import packed_linear
from spin.alignment.generation.transformers.backend import TransformersBackend
from spin.alignment.generation.transformers.kv_cache import RowCache
from spin.alignment.generation.transformers.packed_linear import PackedLinears
from tests.helpers import tiny_llama

PROMPTS = [
    PromptRequest(f"p{number}", tuple(range(5, 5 + length))) for number, length in enumerate([3, 9, 1, 6, 12, 2])
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch):
    monkeypatch.setattr(packed_linear, "_SMALLEST_WEIGHT", 0)


def layers(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 80), nn.Linear(80, 24, bias=False)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 48), (7, 1, 48), (2, 33, 48)])
def test_products_are_those_of_the_layers(dtype, shape):
    model, states = layers(dtype), torch.randn(shape).to(dtype)
    packed = PackedLinears(model)
    with torch.inference_mode():
        expected = model(states)
        with packed.applied():
            assert all("forward" in vars(layer) for layer in model), "nothing was packed"
            found = model(states)
    assert found.dtype == dtype and not any("forward" in vars(layer) for layer in model)
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_products_under_autocast_are_in_its_precision():
    model, states = layers(torch.float32), torch.randn(5, 1, 48)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(states)
        with PackedLinears(model).applied():
            found = model(states)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_what_does_not_gain_or_fit_runs_with_its_own_weights(monkeypatch):
    double = layers(torch.float64)
    with PackedLinears(double).applied():
        assert not any("forward" in vars(layer) for layer in double)
    model = layers(torch.float32)
    monkeypatch.setattr(packed_linear, "_SMALLEST_WEIGHT", 48 * 80 - 1)
    with PackedLinears(model).applied():
        assert ["forward" in vars(layer) for layer in model] == [True, False]
    monkeypatch.setattr(packed_linear, "_MEMORY_SHARE", 1e-12)
    with PackedLinears(model).applied():
        assert not any("forward" in vars(layer) for layer in model)


def test_an_error_restores_the_layers():
    model = layers(torch.float32)
    with pytest.raises(RuntimeError), PackedLinears(model).applied():
        model(torch.randn(1, 47))
    assert not any("forward" in vars(layer) for layer in model)


def greedy(model, batch_size: int = 3) -> list[list[int]]:
    backend = TransformersBackend(BackendSettings("unused", batch_size=batch_size, stop_ids=[3]), model)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=20)
    return [row[0].token_ids for row in backend.generate(PROMPTS, sampling)]


def test_greedy_text_is_the_librarys():
    model = tiny_llama(vocab_size=60, initializer_range=0.3)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt.token_ids])
        settings = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": 3, "pad_token_id": 0}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        expected.append(output[0, ids.shape[1] :].tolist())
    assert greedy(model) == expected


def test_trained_weights_are_used_the_next_time():
    """Online training generates with the module that it trains, between two updates."""
    model = tiny_llama(vocab_size=60, initializer_range=0.3)
    backend = TransformersBackend(BackendSettings("unused", stop_ids=[3]), model)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=20)
    before = backend.generate(PROMPTS, sampling)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for weight in changed.parameters():
            weight += 0.2 * torch.randn_like(weight)
    model.load_state_dict(changed.state_dict())
    after = backend.generate(PROMPTS, sampling)
    assert after != before and after == TransformersBackend(backend.settings, changed).generate(PROMPTS, sampling)


def test_keys_and_values_are_stored_in_the_precision_of_autocast():
    model, cache = tiny_llama(vocab_size=60).eval(), RowCache([None, None])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(torch.tensor([[5, 6, 7]]), past_key_values=cache, use_cache=True)
    assert {buffer.dtype for layer in cache.layers for buffer in layer.buffers} == {torch.bfloat16}


def test_log_probs_under_autocast_are_those_of_a_whole_pass():
    """What online training with bf16 samples, against one forward pass in the same precision."""
    model = tiny_llama(vocab_size=60, initializer_range=0.3).eval()
    with torch.autocast("cpu", torch.bfloat16):
        backend = TransformersBackend(BackendSettings("unused", batch_size=3, stop_ids=[3]), model)
        rows = backend.generate(PROMPTS, SamplingConfig(num_samples=2, max_new_tokens=12, logprobs=True))
        for prompt, row in zip(PROMPTS, rows, strict=True):
            for response in row:
                ids = torch.tensor([[*prompt.token_ids, *response.token_ids]])
                with torch.inference_mode():
                    logps = model(ids).logits[0].float().log_softmax(-1)
                places = range(len(prompt.token_ids) - 1, ids.shape[1] - 1)
                expected = logps[places, response.token_ids]
                assert (torch.tensor(response.logprobs) - expected).abs().mean() < 0.1
