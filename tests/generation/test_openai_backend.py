"""The backend of a server that is running already, against a small server that misbehaves on request."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.generation import PromptRequest, SamplingConfig, sample_seed
from tests.helpers.fake_openai_server import FakeServer, Handler, answer_to
from tests.helpers.openai_backend import (
    QUICK,
    REQUESTS,
    SAMPLING,
    STOP,
    expected,
    ids_of,
    until,
)


def test_every_setting_of_the_sampling_is_in_the_request(server, connect):
    sampling = SamplingConfig(2, 0.7, 0.9, 50, 0.05, 1.1, 30, stop=("END",), logprobs=True, seed=3)
    connect().generate([PromptRequest("p", (5, 6, 7), free_tokens=20)], sampling)
    first, second = sorted(server.bodies, key=lambda body: body["seed"] != sample_seed(3, "p", 0))
    assert first == {
        "model": "tiny",
        "prompt": [5, 6, 7],
        "n": 1,
        "stream": False,
        "max_tokens": 20,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": sample_seed(3, "p", 0),
        "stop_token_ids": [STOP],
        "ignore_eos": True,
        "stop": ["END"],
        "skip_special_tokens": False,
        "return_token_ids": True,
        "logprobs": 0,
    }
    assert second == first | {"seed": sample_seed(3, "p", 1)} and second["seed"] != first["seed"]


def test_responses_do_not_depend_on_order_or_company(connect):
    forward = connect(batch_size=16).generate(REQUESTS, SAMPLING)
    assert ids_of(forward) == expected(REQUESTS)
    assert connect(batch_size=1).generate(REQUESTS, SAMPLING) == forward
    assert connect(batch_size=3).generate(REQUESTS[::-1], SAMPLING)[::-1] == forward
    assert connect().generate(REQUESTS[4:5], SAMPLING) == forward[4:5]
    arrays = [PromptRequest(request.prompt_id, np.array(request.token_ids)) for request in REQUESTS]
    assert connect().generate(arrays, SAMPLING) == forward
    responses = [response for row in forward for response in row]
    assert {response.finish_reason for response in responses} == {"stop", "length"}
    assert all((response.token_ids[-1] == STOP) == (response.finish_reason == "stop") for response in responses)
    assert all(response.logprobs is None for response in responses)


def test_requests_are_drawn_as_room_becomes_free_and_yielded_as_they_finish(server, connect):
    held, drawn = threading.Event(), []

    def hold_the_first(handler: Handler, body: dict[str, Any]) -> bool:
        return not held.wait(30) if body["prompt"] == list(REQUESTS[0].token_ids) else False

    def lazily() -> Iterator[PromptRequest]:
        for request in REQUESTS:
            drawn.append(request.prompt_id)
            yield request

    server.behave = hold_the_first
    stream = connect(batch_size=4).stream(lazily(), SAMPLING)
    assert drawn == []
    # Two of the four places are taken by the first prompt until the end.
    for place in range(1, len(REQUESTS)):
        n, responses = next(stream)
        assert n == place and [response.token_ids for response in responses] == expected(REQUESTS)[n]
        assert len(drawn) <= place + 2
    assert drawn == [request.prompt_id for request in REQUESTS]
    held.set()
    assert [n for n, _ in stream] == [0]


def test_closing_the_stream_gives_up_what_is_in_flight(server, connect):
    gone = threading.Semaphore(0)

    def wait_for_the_end(handler: Handler, body: dict[str, Any]) -> bool:
        if body["prompt"] == list(REQUESTS[0].token_ids):
            return False
        handler.connection.settimeout(30)
        if handler.connection.recv(1, socket.MSG_PEEK) == b"":
            gone.release()
        handler.close_connection = True
        return True

    server.behave = wait_for_the_end
    backend = connect(batch_size=4)
    stream = backend.stream(REQUESTS, SAMPLING)
    assert next(stream)[0] == 0
    until(lambda: len(server.bodies) == 6)
    stream.close()
    assert all(gone.acquire(timeout=10) for _ in range(4))
    # Nothing was started behind the close, and the backend works on.
    assert len(server.bodies) == 6
    server.behave = lambda handler, body: False
    assert ids_of(backend.generate(REQUESTS, SAMPLING)) == expected(REQUESTS)


def slow(handler: Handler, body: dict[str, Any]) -> bool:
    time.sleep(1.5)
    return handler.say(200, answer_to(body))


def aborted(handler: Handler, body: dict[str, Any]) -> bool:
    return handler.say(200, {"choices": [{"finish_reason": "abort", "token_ids": [9], "text": ""}]})


def cut_short(handler: Handler, body: dict[str, Any]) -> bool:
    handler.close_connection = True
    return handler.say(200, b'{"choices": [', Content_Length="500")


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(lambda handler, body: handler.say(500, {"error": {"message": "boom"}}), id="500"),
        pytest.param(lambda handler, body: handler.say(503, b"<html>starting</html>"), id="503"),
        pytest.param(lambda handler, body: handler.say(408, b""), id="408"),
        pytest.param(lambda handler, body: handler.say(429, b"", Retry_After="0"), id="429"),
        pytest.param(lambda handler, body: handler.hang_up(), id="dropped"),
        pytest.param(cut_short, id="cut short"),
        pytest.param(slow, id="slow"),
        pytest.param(aborted, id="aborted"),
    ],
)
def test_trouble_that_passes_changes_nothing(server, connect, trouble):
    left = {json.dumps([list(request.token_ids), sample]): 2 for request in REQUESTS for sample in range(2)}
    seeds = {sample_seed(7, request.prompt_id, sample): sample for request in REQUESTS for sample in range(2)}
    lock = threading.Lock()

    def twice(handler: Handler, body: dict[str, Any]) -> bool:
        key = json.dumps([body["prompt"], seeds[body["seed"]]])
        with lock:
            left[key] -= 1
            fails = left[key] >= 0
        return trouble(handler, body) if fails else False

    requests = [*REQUESTS[:4], *REQUESTS[5:]]  # the fifth has the ids of the fourth
    server.behave = twice
    policy = replace(QUICK, timeout=1.0, seconds_per_token=0.0)
    assert ids_of(connect(policy).generate(requests, SAMPLING)) == expected(requests)
    assert len(server.bodies) == 3 * 2 * len(requests)


def test_a_long_response_is_waited_for_longer(server, connect):
    server.behave = slow
    patient = replace(QUICK, timeout=0.1, seconds_per_token=0.5)
    assert ids_of(connect(patient).generate(REQUESTS[:1], SAMPLING)) == expected(REQUESTS[:1])
    assert len(server.bodies) == 2


def test_retry_after_is_honoured(server, connect):
    times: list[float] = []

    def busy_once(handler: Handler, body: dict[str, Any]) -> bool:
        times.append(time.monotonic())
        return handler.say(429, {"message": "busy"}, Retry_After="1") if len(times) == 1 else False

    server.behave = busy_once
    connect().generate(REQUESTS[:1], replace(SAMPLING, num_samples=1))
    assert len(times) == 2 and 1.0 <= times[1] - times[0] < 3.0


def test_tries_are_bounded(server, connect, caplog):
    server.behave = lambda handler, body: handler.say(500, {"error": {"message": "CUDA error"}})
    message = (
        r"did not answer prompt p0 after 4 tries \(last: HTTP 500: CUDA error\): start it and run the same command"
    )
    with caplog.at_level(logging.WARNING), pytest.raises(InputError, match=message):
        connect(batch_size=1).generate(REQUESTS, SAMPLING)
    assert len(server.bodies) == 4
    assert len([record for record in caplog.records if "trying again" in record.message]) == 1


def test_a_restarted_server_goes_on(server, connect):
    backend = connect(replace(QUICK, attempts=12, first_delay=0.05, max_delay=0.2), batch_size=4)
    stream = backend.stream(REQUESTS, SAMPLING)
    server.behave = lambda handler, body: time.sleep(0.05) or False
    rows = dict([next(stream)])
    port = server.port
    server.close()
    again: list[FakeServer] = []
    starter = threading.Timer(0.3, lambda: again.append(FakeServer(port)))
    starter.start()
    rows |= dict(stream)
    starter.join()
    again[0].close()
    assert ids_of([rows[n] for n in range(len(REQUESTS))]) == expected(REQUESTS)
    assert again[0].bodies and server.bodies


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (400, {"error": {"message": "context is 64 tokens"}}, "refused prompt p0 with HTTP 400: context is 64 tokens"),
        (404, {"message": "no model tiny"}, "refused prompt p0 with HTTP 404: no model tiny"),
        (401, {"error": "Unauthorized"}, "HTTP 401: Unauthorized: set OPENAI_API_KEY to a key that the server accepts"),
        (422, b"too hot", "refused prompt p0 with HTTP 422: too hot"),
        (501, b"", "refused prompt p0 with HTTP 501: Not Implemented"),
        (302, b"", "refused prompt p0 with HTTP 302: Found"),
        (200, b"<html>", "is not JSON: base_url must be"),
        (200, {"choices": []}, "to prompt p0 contains no completion"),
    ],
)
def test_a_refusal_is_not_tried_again(server, connect, monkeypatch, caplog, status, answer, message):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.behave = lambda handler, body: handler.say(status, answer)
    with caplog.at_level(logging.DEBUG), pytest.raises(InputError, match=message) as caught:
        connect().generate(REQUESTS[:1], replace(SAMPLING, num_samples=1))
    assert len(server.bodies) == 1
    assert all(headers["Authorization"] == "Bearer sk-secret" for headers in server.headers)
    assert "sk-secret" not in str(caught.value) + caplog.text


CHOICE = {"finish_reason": "length", "token_ids": [10] * 8, "prompt_token_ids": list(REQUESTS[0].token_ids)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": None}, "returned text but no token ids: this backend needs a server that takes and returns"),
        ({"prompt_token_ids": [1, 5, 6, 7]}, "changed the token ids of prompt p0"),
        ({"finish_reason": "content_filter"}, "did not finish prompt p0: the finish reason is 'content_filter'"),
        ({"finish_reason": None}, "did not finish prompt p0: the finish reason is None"),
        (
            {"finish_reason": "abort"},
            r"did not answer prompt p0 after 4 tries \(last: it aborted the request",
        ),
        (
            {"token_ids": [10] * 5},
            r"ended prompt p0 \(length\) after 5 of 8 tokens, the last is 10.*--generation-config vllm",
        ),
        ({"finish_reason": "stop", "stop_reason": 10}, r"ended prompt p0 \(stop\) after 8 of 8 tokens"),
        (
            {"finish_reason": "stop", "token_ids": []},
            r"ended prompt p0 \(stop\) after 0 of 8 tokens, without a requested reason",
        ),
        ({"logprobs": {"token_logprobs": [-1.0]}}, "did not return a log-prob for each token of prompt p0"),
        ({"logprobs": None}, "did not return a log-prob for each token of prompt p0"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(server, connect, changes, message):
    server.behave = lambda handler, body: handler.say(200, {"choices": [CHOICE | changes]})
    with pytest.raises(InputError, match=message):
        connect().generate(REQUESTS[:1], replace(SAMPLING, num_samples=1, logprobs="logprobs" in changes))


@pytest.mark.parametrize(("said", "kept"), [([65, 66, 67], 3), ([65, 66, 67, 68, 69], 3), ([66, 67], 2)])
def test_a_stop_text_ends_at_the_id_that_completes_it(server, connect, said, kept):
    values = [-0.5] * len(said)
    choice = {"finish_reason": "stop", "stop_reason": "BC", "token_ids": said, "logprobs": {"token_logprobs": values}}
    server.behave = lambda handler, body: handler.say(200, {"choices": [choice]})
    backend = connect(decode=lambda ids: "".join(map(chr, ids)))
    (response,) = backend.generate(REQUESTS[:1], SamplingConfig(max_new_tokens=8, stop=("BC",), logprobs=True))[0]
    assert (response.token_ids, response.finish_reason) == (said[:kept], "stop")
    assert response.logprobs == values[:kept]


def test_a_stop_id_at_the_length_limit_is_a_stop(server, connect):
    server.behave = lambda handler, body: handler.say(200, {"choices": [CHOICE | {"token_ids": [10] * 7 + [STOP]}]})
    (response,) = connect().generate(REQUESTS[:1], replace(SAMPLING, num_samples=1))[0]
    assert response.finish_reason == "stop"


def test_log_probs_come_with_their_tokens(connect):
    for response in connect().generate(REQUESTS[:1], replace(SAMPLING, logprobs=True))[0]:
        assert response.logprobs == [-token / 100 for token in response.token_ids]


def test_an_error_of_the_callers_iterator_comes_through(connect):
    def broken() -> Iterator[PromptRequest]:
        yield REQUESTS[0]
        raise InputError("lease lost")

    with pytest.raises(InputError, match="lease lost"):
        connect().generate(broken(), SAMPLING)


def test_ids_without_a_token_are_biased_away_and_refused_when_a_server_samples_one(server, connect):
    masked = tuple(range(300, 2000))  # more than a request may bias: the rest is checked in the responses
    backend = connect(masked_ids=masked)
    backend.generate(REQUESTS[:1], SAMPLING)
    bias = server.bodies[0]["logit_bias"]
    assert len(bias) == 1024 and set(bias.values()) == {-100.0} and {"300", "1323"} <= bias.keys()
    sampled = expected(REQUESTS[:1])[0][0][0]
    with pytest.raises(InputError, match=f"sampled token id {sampled}, for which the tokenizer has no token"):
        connect(masked_ids=(sampled,)).generate(REQUESTS[:1], SAMPLING)
