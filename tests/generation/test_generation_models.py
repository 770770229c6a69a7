"""The transformers backend's own decoding loop: the library's greedy text for every kind of cache, and rows that come and go."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from transformers import GenerationConfig

from spin.alignment.core.errors import InputError
from spin.alignment.generation import PromptRequest, SamplingConfig
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.transformers.backend import TransformersBackend
from spin.alignment.generation.transformers.decoder import Decoder
from tests.helpers import tiny_llama

STOP = 3
SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large weights: attention that looks at single tokens, and greedy text that does not repeat itself at once.
    "initializer_range": 0.3,
}
GEMMA = {"head_dim": 8, "sliding_window": 7, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 9.0}
MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": 7},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Phi3": {"sliding_window": None},
    "Gemma2": GEMMA,
    "Gemma3Text": {"head_dim": 8, "sliding_window": 7, "sliding_window_pattern": 2},
    "GPT2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256},
}
PROMPTS = [tuple(5 + (7 * n + 3 * place) % 50 for place in range(length)) for n, length in enumerate([3, 19, 1, 8, 30])]


def build(kind: str, **settings: object):
    names = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}
    config = getattr(transformers, f"{kind}Config")(**SHAPE | MODELS[kind] | settings)
    torch.manual_seed(1)
    return getattr(transformers, names.get(kind, f"{kind}ForCausalLM"))(config).eval()


def backend(model, batch_size: int = 16, **settings) -> TransformersBackend:
    given = {"batch_size": batch_size, "stop_ids": [STOP], **settings}
    return TransformersBackend(BackendSettings("unused", **given), model)


def requests(prompts=PROMPTS) -> list[PromptRequest]:
    return [PromptRequest(f"p{number}", prompt) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_text_is_the_librarys(kind):
    """Sequences of up to 54 tokens, windows of 7 where there are any; rows of unlike length that join at different times."""
    model = build(kind)
    settings = GenerationConfig(do_sample=False, max_new_tokens=24, eos_token_id=STOP, pad_token_id=0)
    # The library's own SDPA leaves soft caps out.
    plain = build(kind, attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    expected = [
        plain.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=settings)
        for prompt in PROMPTS
    ]
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=24)
    texts = [row[0].token_ids for row in backend(model, batch_size=2).generate(requests(), greedy)]
    assert texts == [ids[0, len(prompt) :].tolist() for ids, prompt in zip(expected, PROMPTS, strict=True)]
    assert len({token for text in texts for token in text}) > 4, "text that says nothing about attention"
    assert model.config._attn_implementation == "sdpa"
    for other in (plain, model):
        assert [row[0].token_ids for row in backend(other).generate(requests(), greedy)] == texts


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma2", "GPT2"])
def test_sampled_text_does_not_depend_on_company(kind, monkeypatch):
    # Blocks of rows in the attention, as in a model of some size.
    monkeypatch.setattr("spin.alignment.generation.transformers.decode_attention._BYTES_PER_CALL", 2000)
    model = build(kind)
    sampling = SamplingConfig(num_samples=3, temperature=1.0, max_new_tokens=30, seed=5)
    prompts = requests(PROMPTS * 2)
    expected = backend(model, batch_size=64).generate(prompts, sampling)
    lengths = {len(response.token_ids) for row in expected for response in row}
    assert len(lengths) > 3, "no mixed lengths, so no row joined another one's batch"
    assert backend(model, batch_size=3).generate(prompts, sampling) == expected
    assert backend(model, batch_size=7).generate(prompts[::-1], sampling) == expected[::-1]
    assert backend(model).generate(prompts[3:4], dataclasses.replace(sampling, num_samples=2)) == [expected[3][:2]]


def test_rows_join_a_running_batch_and_the_prompt_of_several_samples_is_read_once(monkeypatch):
    joined, shapes = [], []
    add, forward = Decoder.add, Decoder._forward

    def watched_add(self, jobs):
        joined.append((len(self.jobs), len(jobs)))
        return add(self, jobs)

    def watched_forward(self, ids, *others):
        shapes.append(tuple(ids.shape))
        return forward(self, ids, *others)

    monkeypatch.setattr(Decoder, "add", watched_add)
    monkeypatch.setattr(Decoder, "_forward", watched_forward)
    sampling = SamplingConfig(num_samples=4, max_new_tokens=30)
    backend(build("Llama"), batch_size=8).generate(requests(PROMPTS * 3), sampling)
    assert joined[0] == (0, 8) and shapes[0] == (2, 19), "two prompts of four samples each fill eight rows"
    assert any(running and added for running, added in joined)
    steps = [rows for rows, columns in shapes if columns == 1]
    assert max(steps) == 8 and len(set(steps)) > 3, "rows that ended do not stay in the batch"


def test_responses_that_lose_their_place_are_taken_up_again(monkeypatch):
    model, sampling = build("Mistral"), SamplingConfig(num_samples=2, max_new_tokens=40, logprobs=True)
    expected = backend(model, stop_ids=[]).generate(requests(), sampling)
    evicted, evict = [], Decoder.evict

    def watched(self):
        job = evict(self)
        evicted.append(len(job.ids))
        return job

    monkeypatch.setattr(Decoder, "evict", watched)
    tight = backend(model, stop_ids=[])
    monkeypatch.setattr(tight, "_columns", lambda: 120)
    found = tight.generate(requests(), sampling)
    assert any(evicted), "nothing lost its place"
    assert [[response.token_ids for response in row] for row in found] == [
        [response.token_ids for response in row] for row in expected
    ]
    for row, other in zip(found, expected, strict=True):
        for response, same in zip(row, other, strict=True):
            assert response.logprobs == pytest.approx(same.logprobs, abs=1e-4)


def test_requests_are_drawn_late_and_closing_gives_up():
    drawn = []

    def source():
        for request in requests(PROMPTS * 10):
            drawn.append(request.prompt_id)
            yield dataclasses.replace(request, prompt_id=str(len(drawn)))

    served = backend(build("Llama"), batch_size=4)
    stream = served.stream(source(), SamplingConfig(max_new_tokens=30))
    assert drawn == []
    for done in range(1, 12):
        next(stream)
        assert len(drawn) <= done + 4
    stream.close()
    before = len(drawn)
    assert served.generate(requests()[:1], SamplingConfig(max_new_tokens=2))
    assert len(drawn) == before


def test_responses_come_as_soon_as_they_are_complete():
    prompts = [PromptRequest("long", (5, 6), free_tokens=50), PromptRequest("short", (5, 7), free_tokens=2)]
    served = backend(build("Llama"), stop_ids=[])
    numbers = [number for number, _ in served.stream(prompts, SamplingConfig(max_new_tokens=0))]
    assert numbers == [1, 0]


def test_room_and_max_new_tokens_limit_together():
    prompts = [
        PromptRequest("a", (5, 6), free_tokens=4),
        PromptRequest("b", (7, 8), free_tokens=20),
        PromptRequest("c", (9,)),
    ]
    served = backend(build("Llama"), stop_ids=[])
    found = served.generate(prompts, SamplingConfig(max_new_tokens=9))
    assert [len(row[0].token_ids) for row in found] == [4, 9, 9]
    assert [len(row[0].token_ids) for row in served.generate(prompts[:2], SamplingConfig(max_new_tokens=0))] == [4, 20]
    with pytest.raises(ValueError, match="prompt c"):
        served.generate(prompts, SamplingConfig(max_new_tokens=0))
    with pytest.raises(ValueError, match="prompt d is empty"):
        served.generate([PromptRequest("d", ())], SamplingConfig())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_the_models_own(temperature):
    """Temperature, cut-offs and penalty change what is drawn, not the log-probs that are told."""
    model, count = build("Gemma3Text"), 1 if temperature == 0.0 else 3
    sampling = SamplingConfig(
        count, temperature, top_k=9, min_p=0.01, repetition_penalty=1.3, max_new_tokens=12, logprobs=True
    )
    for prompt, row in zip(PROMPTS, backend(model).generate(requests(), sampling), strict=True):
        for response in row:
            ids = torch.tensor([[*prompt, *response.token_ids]])
            with torch.inference_mode():
                logps = model(ids).logits[0].log_softmax(-1)
            expected = logps[range(len(prompt) - 1, ids.shape[1] - 1), response.token_ids].tolist()
            assert response.logprobs == pytest.approx(expected, abs=2e-4)
    assert backend(model).generate(requests()[:1], SamplingConfig(max_new_tokens=2))[0][0].logprobs is None


def test_repetition_penalty_counts_prompt_and_response():
    """Against a loop without a cache; a batch of unlike prompts shows that padding does not count."""
    model, penalty = build("Llama"), 1.4
    greedy = SamplingConfig(temperature=0.0, repetition_penalty=penalty, max_new_tokens=20)
    texts = [row[0].token_ids for row in backend(model, batch_size=3).generate(requests(), greedy)]
    plain = [row[0].token_ids for row in backend(model).generate(requests(), SamplingConfig(temperature=0.0))]
    assert texts != [text[:20] for text in plain]
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = list(prompt)
        while len(ids) - len(prompt) < 20 and STOP not in ids[len(prompt) :]:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            for token in set(ids):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            ids.append(int(logits.argmax()))
        assert text == ids[len(prompt) :]


def test_stop_texts_end_a_response_and_stay_in_it():
    def decode(ids):
        return "".join(chr(ord("a") + token % 26) for token in ids)

    model = build("Llama")
    sampling = SamplingConfig(num_samples=8, max_new_tokens=60)
    free = backend(model, stop_ids=[]).generate(requests(), sampling)
    stops = ("a", "bc")
    served = backend(model, stop_ids=[], decode=decode)
    found = served.generate(requests(), dataclasses.replace(sampling, stop=stops))
    reasons = set()
    for row, whole in zip(found, free, strict=True):
        for response, other in zip(row, whole, strict=True):
            ends = (n for n in range(1, 61) if any(stop in decode(other.token_ids[:n]) for stop in stops))
            end = next(ends, None)
            assert response.token_ids == other.token_ids[:end]
            assert response.finish_reason == ("length" if end is None else "stop")
            reasons.add(response.finish_reason)
    assert "stop" in reasons
    with pytest.raises(ValueError, match=r"settings\.decode"):
        backend(model).generate(requests(), dataclasses.replace(sampling, stop=stops))


def test_half_precision_follows_the_model():
    model = build("Mistral").to(torch.bfloat16)
    sampling = SamplingConfig(num_samples=4, max_new_tokens=24, logprobs=True)
    for prompt, row in zip(PROMPTS, backend(model, batch_size=5).generate(requests(), sampling), strict=True):
        for response in row:
            ids = torch.tensor([[*prompt, *response.token_ids]])
            with torch.inference_mode():
                logps = model(ids).logits[0].float().log_softmax(-1)
            expected = logps[range(len(prompt) - 1, ids.shape[1] - 1), response.token_ids]
            assert (torch.tensor(response.logprobs) - expected).abs().mean() < 0.1


def test_weights_that_are_not_finite_are_told():
    model = tiny_llama(vocab_size=60)
    model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite after prompt p"):
        backend(model).generate(requests(), SamplingConfig())


def test_models_with_another_state_are_refused_by_name():
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**shape, state_size=4))
    with pytest.raises(InputError, match=r"MambaForCausalLM has a recurrent state.*--backend vllm"):
        backend(mamba)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(InputError, match="T5ForConditionalGeneration has an encoder"):
        backend(t5)


def test_positions_that_depend_on_neighbours_are_refused():
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = build("Phi3", rope_parameters=rope, original_max_position_embeddings=32)
    served = backend(model)
    assert served.generate(requests()[:1], SamplingConfig(max_new_tokens=29))
    with pytest.raises(InputError, match="prompt p0 with 30 new tokens exceeds position 32"):
        served.generate(requests(), SamplingConfig(max_new_tokens=30))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A model folder, an adapter folder for it, and the model with the adapter merged."""
    peft = pytest.importorskip("peft")
    from tests.helpers import save_tiny_model

    folder = save_tiny_model(tmp_path_factory.mktemp("base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(2)
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(base, settings)
    adapted.save_pretrained(folder / "adapter")
    return folder, folder / "adapter", adapted.merge_and_unload()


def test_an_adapter_is_served(adapter):
    folder, adapter_folder, merged = adapter
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=12)
    expected = backend(merged).generate(requests(), greedy)
    served = TransformersBackend(BackendSettings(str(folder), adapter=str(adapter_folder), stop_ids=[STOP]))
    assert served.generate(requests(), greedy) == expected
    bare = TransformersBackend(BackendSettings(str(folder), stop_ids=[STOP]))
    assert bare.generate(requests(), greedy) != expected
    half = BackendSettings(str(folder), adapter=str(adapter_folder), dtype="bfloat16", stop_ids=[STOP])
    (response,) = TransformersBackend(half).generate(requests()[:1], dataclasses.replace(greedy, logprobs=True))[0]
    ids = torch.tensor([[*PROMPTS[0], *response.token_ids]])
    logps = merged(ids).logits[0].log_softmax(-1)[len(PROMPTS[0]) - 1 : -1]
    expected_logps = logps[range(len(response.token_ids)), response.token_ids].detach()
    assert (torch.tensor(response.logprobs) - expected_logps).abs().max() < 0.1


def test_an_adapter_that_does_not_fit_is_told(adapter, tmp_path, monkeypatch):
    from tests.helpers import save_tiny_model

    _, adapter_folder, _ = adapter
    other = save_tiny_model(tmp_path / "other", hidden_size=48)
    with pytest.raises(InputError, match="does not fit the model"):
        TransformersBackend(BackendSettings(str(other), adapter=str(adapter_folder)))
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        TransformersBackend(BackendSettings(str(other), adapter=str(tmp_path)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"selfplay-spin\[peft\]"):
        TransformersBackend(BackendSettings(str(other), adapter=str(adapter_folder)))
