"""Weights on their way to a running engine: in pieces, once each whatever is sent again, and never half a set put to use."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.vllm import weight_receiver
from spin.alignment.generation.vllm.backend import VLLMBackend
from spin.alignment.generation.vllm.weight_receiver import LOST, TAKEN, WeightReceiver, WeightsRefused, send_weights

WEIGHTS = {
    "a": torch.arange(7.0).to(torch.bfloat16),
    "b": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "scalar": torch.tensor(2.5),
}


class Worker(WeightReceiver):
    """A worker without vLLM: what its model was given, and what was done with it."""

    def __init__(self, known=tuple(WEIGHTS)):
        self.loaded, self.done = {}, []

        def load_weights(weights):
            self.loaded |= dict(weights)
            return {name for name, _ in weights if name in known}

        self.model_runner = SimpleNamespace(get_model=lambda: SimpleNamespace(load_weights=load_weights))

    def _prepare(self):
        self.done.append("prepare")

    def _put_to_use(self):
        self.done.append("use")

    def _within_vllm(self, function, *arguments):
        return function(*arguments)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(weight_receiver, "PIECE_BYTES", 9)


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_all_workers_get_every_weight_though_a_message_is_repeated(as_text, times):
    workers = [Worker(), Worker()]

    def call(method, arguments):
        for _ in range(times):
            answers = [getattr(worker, method)(*arguments) for worker in workers]
        return answers

    assert send_weights(call, WEIGHTS.items(), as_text)
    for worker in workers:
        assert worker.loaded.keys() == WEIGHTS.keys()
        assert all(torch.equal(worker.loaded[name], WEIGHTS[name]) for name in WEIGHTS)
        assert worker.done[-1] == "use" and worker.done.count("use") == times  # a repeated beginning drops the first


def test_a_worker_that_was_started_anew_is_noticed_and_the_weights_are_drawn_to_their_end():
    workers, calls, drawn = [Worker()], [], []

    def call(method, arguments):
        calls.append(method)
        if len(calls) == 4:
            workers[0] = Worker()
        return [getattr(worker, method)(*arguments) for worker in workers]

    def weights():
        for item in WEIGHTS.items():
            drawn.append(item[0])
            yield item

    assert not send_weights(call, weights())
    assert drawn == list(WEIGHTS)
    assert workers[0].done == [] and "end_policy_weights" not in calls


def test_an_unfinished_push_is_dropped_and_its_pieces_are_refused():
    worker = Worker()
    worker.begin_policy_weights("first")
    assert worker.take_policy_piece("first", 0, "a", "float32", [4], bytes(8)) == TAKEN
    assert worker.take_policy_piece("first", 2, "a", "float32", [4], bytes(8)) == LOST  # the piece between is missing
    worker.begin_policy_weights("second")
    assert worker.done == ["prepare", "use", "prepare"]
    assert worker.take_policy_piece("first", 1, "a", "float32", [4], bytes(8)) == LOST
    assert worker.end_policy_weights("second", 1) == LOST
    assert not worker.loaded


def test_a_weight_that_the_model_does_not_take_is_an_error_also_when_it_is_sent_again():
    """A server repeats what failed; the worker must not take the repetition for one whose answer was lost."""
    worker = Worker(known=("b",))

    def call(method, arguments):
        getattr(worker, method)(*arguments)
        return [getattr(worker, method)(*arguments)]

    with pytest.raises(WeightsRefused, match="a: the model has no such weight"):
        send_weights(call, WEIGHTS.items())
    with pytest.raises(WeightsRefused, match="a: the model"):  # nor is it usable for another push
        send_weights(call, [("b", WEIGHTS["b"])])
    assert not worker._policy_push.complete


def test_weights_that_do_not_fit_together_are_an_error():
    worker = Worker()

    def fails():
        raise RuntimeError("start (0) + length (64) exceeds dimension size (63).")

    worker._put_to_use = fails
    with pytest.raises(WeightsRefused, match="exceeds dimension size"):
        send_weights(lambda method, arguments: [getattr(worker, method)(*arguments)], WEIGHTS.items())


def test_an_engine_sleeps_without_weights_and_wakes_for_them_before_it_makes_its_cache():
    done = []

    class Engine:
        def __getattr__(self, name):
            def call(*arguments, **settings):
                done.append(settings["args"] and arguments[0] if "args" in settings else (name, settings))
                return [TAKEN] if name == "collective_rpc" else True

            return call

    backend = VLLMBackend.__new__(VLLMBackend)
    backend.settings, backend.engine, backend._sleeps = BackendSettings(model="m"), Engine(), True
    backend.sleep()
    backend.load([])
    assert done == [
        ("sleep", {"level": 2}),
        ("wake_up", {"tags": ["weights"]}),
        "begin_policy_weights",
        "end_policy_weights",
        ("wake_up", {"tags": ["kv_cache"]}),
        ("reset_prefix_cache", {}),
    ]
