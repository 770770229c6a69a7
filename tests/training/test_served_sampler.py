"""Online training samples from a server elsewhere: it has the policy's weights, whatever happens to it meanwhile."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from spin.alignment.core.errors import InputError
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.openai.backend import OpenAIBackend
from spin.alignment.generation.openai.policy_server import PolicyServer
from spin.alignment.training.online.engine_sampler import EngineSampler
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


@pytest.fixture
def quick(sampler, monkeypatch):
    """The sampler, sending every weight in one piece."""
    monkeypatch.setattr("spin.alignment.generation.vllm.weight_receiver.PIECE_BYTES", 2**26)
    return sampler


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


def test_a_server_with_another_model_is_said_at_once(served, sampler):
    served.take_policy_piece = lambda push, number, name, *_: f"refused: {name}: the model has no such weight"
    with pytest.raises(
        InputError, match=r"does not take the policy's weights \(model\..*\): start it anew, with the model"
    ):
        sampler.refresh()


def test_a_batch_is_asked_for_in_a_thread(served, quick):
    """While it is under way, nothing else is asked; its responses have the version of the weights before it."""
    ask = threading.Event()
    served.behave = lambda handler, body: not ask.wait(10)
    quick.refresh()
    version = served.version
    quick.start(REQUESTS, SAMPLING)
    with pytest.raises(RuntimeError, match="a batch is under way"):
        quick.refresh()
    with pytest.raises(RuntimeError, match="a batch is under way"):
        quick.start(REQUESTS, SAMPLING)
    ask.set()
    rows = quick.finish()
    assert [[response.token_ids for response in row] for row in rows] == expected(REQUESTS)
    assert {response.weights_version for row in rows for response in row} == {version}
    quick.refresh()
    assert served.version != version


def test_a_batch_whose_weights_were_lost_is_not_returned(served, quick):
    quick.refresh()
    quick.start(REQUESTS, SAMPLING)
    served.restart()
    assert quick.finish() is None
    quick.refresh()
    assert quick.respond(REQUESTS[:1], SAMPLING)


def test_a_server_that_fails_in_the_thread_is_named_when_the_batch_is_needed(served, quick):
    served.behave = lambda handler, body: handler.say(400, {"error": {"message": "no such thing"}})
    quick.start(REQUESTS, SAMPLING)
    with pytest.raises(InputError, match="no such thing"):
        quick.finish()
    quick.forget()
    served.behave = lambda handler, body: False
    quick.refresh()
    quick.start(REQUESTS, SAMPLING)
    assert quick.finish() is not None


def test_closing_does_not_wait_for_a_server_that_does_not_answer(served, quick):
    never, asked = threading.Event(), threading.Event()

    def hang(handler, body):
        asked.set()
        return never.wait(30)

    served.behave = hang
    quick.start(REQUESTS, SAMPLING)
    assert asked.wait(10)
    started = time.monotonic()
    quick.close()
    assert time.monotonic() - started < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "sampling"]
    never.set()


class Engine:
    """Answers one prompt after another until it is cancelled; the last one never."""

    def __init__(self):
        self.done, self.cancelled, self.closed = [], threading.Event(), False

    def generate(self, requests, sampling):
        self.done += requests[:-1]
        assert self.cancelled.wait(20)
        return [[] for _ in self.done]

    def sleep(self):
        self.done.append("sleep")

    def cancel(self):
        self.cancelled.set()

    def close(self):
        assert not [thread for thread in threading.enumerate() if thread.name == "sampling"]
        self.closed = True


def test_an_engine_is_closed_in_the_middle_of_a_batch(policy):
    engine = Engine()
    sampler = EngineSampler(engine, policy, torch.float32)
    sampler.start(REQUESTS, SAMPLING)
    with pytest.raises(RuntimeError, match="a batch is under way"):
        sampler.refresh()
    sampler.close()
    assert engine.closed and engine.done == [*REQUESTS[:-1], "sleep"]


def test_a_server_without_the_endpoints_is_refused_with_the_command():
    fake = FakeServer()
    server = PolicyServer(fake.url, policy=QUICK)
    with pytest.raises(InputError, match=r"VLLM_SERVER_DEV_MODE=1 and with --worker-extension-cls spin.alignment"):
        server.version()
    server.close()
    fake.close()
