"""Online training with LoRA sends only the adapter, or says why not; what is written for vLLM is what peft reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from spin.alignment.core.errors import InputError
from spin.alignment.generation import find_backend
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.openai.backend import OpenAIBackend
from spin.alignment.generation.openai.policy_server import ADAPTER, PolicyServer
from spin.alignment.generation.vllm.weight_receiver import LOST, WeightReceiver, send_weights
from spin.alignment.models.adapters import adapter_config, add_adapters, write_adapter
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.sharded import adapter_weights
from spin.alignment.training.online.adapter_push import adapter_rank, server_adapter_rank
from spin.alignment.training.online.engine_sampler import EngineSampler
from spin.alignment.training.online.served_sampler import ServedSampler
from tests.helpers.fake_policy_server import FRESH, FakePolicyServer
from tests.helpers.openai_backend import QUICK, REQUESTS, SAMPLING, STOP, expected

ARGS = SimpleNamespace(process_index=0, backend="vllm", server_url="http://host/v1")
LORA = ModelConfig("tiny", use_peft=True, lora_r=4)


@pytest.fixture
def policy(tiny_model):
    return adapted(tiny_model)


def adapted(tiny_model, **changes):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = add_adapters(model, ModelConfig(str(tiny_model), use_peft=True, **{"lora_r": 4, **changes}))
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            if weight.requires_grad:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    return model


@pytest.fixture
def served():
    fake = FakePolicyServer()
    fake.rank = 8
    yield fake
    fake.close()


@pytest.fixture
def sampler(served, policy):
    backend = OpenAIBackend(BackendSettings("tiny", stop_ids=[STOP], base_url=served.url), QUICK, first_contact=QUICK)
    made = ServedSampler(backend, PolicyServer(served.url, policy=QUICK), policy, torch.float32, only_adapter=True)
    yield made
    made.close()


def test_peft_reads_what_is_written_for_the_engine(policy, tiny_model):
    from peft import PeftModel

    class Engine:
        def load_adapter(self, folder):
            base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
            ids, self.folder = torch.arange(5, 25)[None], folder
            with torch.no_grad():
                assert torch.equal(PeftModel.from_pretrained(base, folder)(ids).logits, policy(ids).logits)

        def cancel(self):
            pass

        def close(self):
            self.closed = True

    engine = Engine()
    sampler = EngineSampler(engine, policy, torch.float32, only_adapter=True)
    sampler.refresh()
    sampler.close()
    assert engine.folder and engine.closed
    assert not Path(engine.folder).exists()  # removed once it was read


def test_the_server_gets_the_adapter_alone_and_answers_with_it(served, policy, sampler):
    for count in (1, 2):
        sampler.refresh()
        sent = {name: weight.clone() for name, weight in adapter_weights(policy)}
        assert served.weights.keys() == sent.keys() and all(
            torch.equal(served.weights[name], sent[name]) for name in sent
        )
        assert served.adapter == adapter_config(policy) and served.adapters_loaded == count and not served.paused
        rows = sampler.respond(REQUESTS, SAMPLING)
        assert [[response.token_ids for response in row] for row in rows] == expected(REQUESTS)
        assert {body["model"] for body in served.bodies} == {ADAPTER + served.version}
        assert served.served == ["tiny", ADAPTER + served.version]  # and not those before
        served.bodies.clear()
        with torch.no_grad():
            next(weight for weight in policy.parameters() if weight.requires_grad).add_(1)


def test_a_server_that_restarts_and_forgets_the_adapter_gets_it_again(served, sampler):
    sampler.refresh()
    seen = []

    def restart_once(path):
        seen.append(path)
        if seen.count("/v1/completions") == 2:
            served.restart()
            served.before = lambda _: None

    served.before = restart_once
    rows = sampler.respond(REQUESTS, SAMPLING)
    assert served.before is not restart_once and served.version != FRESH and served.adapters_loaded == 2
    assert {response.weights_version for row in rows for response in row} == {served.version}


def test_an_adapter_whose_answer_was_lost_is_not_refused_as_loaded_already(served, sampler):
    served.lost_answers = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
    sampler.refresh()
    sampler.refresh()
    assert served.served == ["tiny", ADAPTER + served.version] and served.adapters_loaded == 2 and not served.paused


def test_a_refusal_for_another_reason_is_an_error(served, sampler):
    sampler.refresh()
    served.served.clear()
    with pytest.raises(InputError, match="HTTP 404: no such model"):
        sampler.respond(REQUESTS, SAMPLING)


@pytest.mark.parametrize(
    ("changes", "obstacle", "reason"),
    [
        ({}, None, None),
        ({"lora_target_modules": ["q_proj", "lm_head"]}, None, "it adapts lm_head"),
        ({"lora_target_modules": ["embed_tokens"]}, None, "it adapts model.embed_tokens"),
        ({}, "the engine is old", "the engine is old"),
    ],
)
def test_an_adapter_is_merged_only_for_a_reason_that_is_named(tiny_model, capsys, changes, obstacle, reason):
    rank = adapter_rank(adapted(tiny_model, **changes), LORA, ARGS, lambda rank: obstacle)
    said = capsys.readouterr().out
    assert rank == (0 if reason else 4)
    assert said == (
        f"backend vllm gets whole weights, into which the LoRA adapter is merged: {reason}\n" if reason else ""
    )


def test_the_highest_rank_of_an_engine_is_its_limit():
    assert find_backend("vllm").adapter_obstacle(None, 513) == "its rank 513 is above 512"


def test_an_adapter_that_the_caller_added_is_merged_because_the_weights_below_may_differ(policy):
    assert adapter_rank(policy, ModelConfig("tiny"), ARGS, lambda rank: None) == 0


def test_a_server_is_asked_for_the_ranks_that_it_takes(served, policy, capsys):
    server = PolicyServer(served.url, policy=QUICK)
    assert server_adapter_rank(policy, LORA, ARGS, server) == 4
    served.rank = 0
    assert server_adapter_rank(policy, LORA, ARGS, server) == 0
    assert (
        "the server applies none; started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora"
        in capsys.readouterr().out
    )
    for rank in (2, -1):
        served.rank = rank
        with pytest.raises(InputError, match="started with --enable-lora, so its weights cannot be replaced"):
            server_adapter_rank(policy, LORA, ARGS, server)
    server.close()


class Worker(WeightReceiver):
    """A worker whose model takes no weights, as those that arrive are an adapter's."""

    model_runner = None


def test_a_worker_writes_the_adapter_and_removes_it(policy, tmp_path):
    worker = Worker()
    assert worker.write_policy_adapter() == LOST
    call = lambda method, arguments: [getattr(worker, method)(*arguments)]  # noqa: E731
    assert send_weights(call, adapter_weights(policy), as_text=True, adapter=adapter_config(policy))
    folder = Path(worker.write_policy_adapter())
    write_adapter(tmp_path, adapter_config(policy), adapter_weights(policy))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    worker.remove_policy_adapter()
    assert not folder.exists()
