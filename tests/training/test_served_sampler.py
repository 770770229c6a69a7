"""Online training samples from a server elsewhere: it has the policy's weights, whatever happens to it meanwhile."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from spin.alignment.core.errors import InputError
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.openai.backend import OpenAIBackend
from spin.alignment.generation.openai.policy_server import PolicyServer
from spin.alignment.training.online.served_sampler import ServedSampler
from tests.helpers.fake_openai_server import FakeServer
from tests.helpers.fake_policy_server import FRESH, FakePolicyServer
from tests.helpers.openai_backend import QUICK, REQUESTS, SAMPLING, STOP, expected


@pytest.fixture
def served():
    fake = FakePolicyServer()
    yield fake
    fake.close()


@pytest.fixture
def policy(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture
def sampler(served, policy, monkeypatch):
    monkeypatch.setattr("spin.alignment.generation.vllm.weight_receiver.PIECE_BYTES", 1000)
    backend = OpenAIBackend(BackendSettings("tiny", stop_ids=[STOP], base_url=served.url), QUICK, first_contact=QUICK)
    made = ServedSampler(backend, PolicyServer(served.url, policy=QUICK), policy, torch.bfloat16)
    yield made
    made.close()


def has_weights_of(served, policy) -> bool:
    expected = {name: weight.to(torch.bfloat16) for name, weight in policy.named_parameters()}
    return served.weights.keys() == expected.keys() and all(
        torch.equal(served.weights[name], expected[name]) for name in expected
    )


def test_the_server_gets_the_weights_and_each_response_their_version(served, policy, sampler):
    versions = []
    for _ in range(2):
        sampler.refresh()
        assert has_weights_of(served, policy) and not served.paused
        rows = sampler.respond(REQUESTS, SAMPLING)
        assert [[response.token_ids for response in row] for row in rows] == expected(REQUESTS)
        assert {response.weights_version for row in rows for response in row} == {served.version}
        versions.append(served.version)
        with torch.no_grad():
            policy.lm_head.weight += 1
    assert len({FRESH, *versions}) == 3


@pytest.mark.parametrize(("path", "count"), [("/collective_rpc", 5), ("/v1/completions", 5), ("/resume", 1)])
def test_a_server_that_restarts_gets_the_weights_again(served, policy, sampler, path, count):
    """While they are sent, while it answers, or in between."""
    sampler.refresh()
    seen = []

    def restart_once(asked):
        seen.append(asked)
        if seen.count(path) == count:
            served.restart()
            served.before = lambda _: None

    served.before = restart_once
    if path != "/v1/completions":
        sampler.refresh()
    rows = sampler.respond(REQUESTS, SAMPLING)
    assert served.before is not restart_once  # it did restart
    assert served.version != FRESH and has_weights_of(served, policy)
    assert {response.weights_version for row in rows for response in row} == {served.version}


def test_a_server_that_always_restarts_is_given_up(served, sampler):
    served.before = lambda path: served.restart() if path == "/v1/completions" else None
    with pytest.raises(InputError, match="lost the policy's weights during 3 batches of responses"):
        sampler.respond(REQUESTS, SAMPLING)


def test_a_server_without_the_endpoints_is_refused_with_the_command():
    fake = FakeServer()
    server = PolicyServer(fake.url, policy=QUICK)
    with pytest.raises(InputError, match=r"VLLM_SERVER_DEV_MODE=1 and with --worker-extension-cls spin.alignment"):
        server.version()
    server.close()
    fake.close()
