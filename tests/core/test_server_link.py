"""The openai backend and its server: which model, which context, which addresses, how often it is asked."""

from __future__ import annotations

import email.utils
import socket
import time
from typing import Any

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.server_link import RetryPolicy, is_this_machine, retry_after_delay
from spin.alignment.generation import make_backend
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.openai.backend import OpenAIBackend, find_model
from tests.helpers.openai_backend import (
    REQUESTS,
    SAMPLING,
    STOP,
    expected,
    ids_of,
)


def settings_for(model: object, **changes: Any) -> BackendSettings:
    return BackendSettings(str(model), stop_ids=[STOP], **changes)


def test_a_model_is_known_by_its_id_its_folder_or_the_name_of_its_folder(tmp_path):
    folder, other = tmp_path / "a" / "iter0", tmp_path / "b" / "iter0"
    for one in (folder, other):
        one.mkdir(parents=True)
    elsewhere = {"id": "/mnt/models/iter0", "root": "/mnt/models/iter0"}
    for card in (
        {"id": str(folder), "root": str(folder)},
        {"id": "policy", "root": str(folder)},
        {"id": "iter0", "root": "/mnt/models/iter0"},
        elsewhere,
        {"id": "policy", "root": "/mnt/models/iter0"},
        {"id": "iter0"},
    ):
        assert find_model([{"id": "more"}, card], settings_for(folder), "URL") == card["id"]
    assert find_model([elsewhere, {"id": "iter0"}], settings_for("iter0"), "URL") == "iter0"
    assert find_model([{"id": "x", "root": "org/name"}], settings_for("org/name"), "URL") == "x"
    for cards in (
        [{"id": "iter0", "root": str(other)}],
        [{"id": "iter0", "parent": "base"}],
        [{"id": "iter1"}],
        [],
    ):
        with pytest.raises(
            InputError, match=rf"not {folder}: start one that lists it as iter0, such as .* --served-model-name iter0"
        ):
            find_model(cards, settings_for(folder), "URL")
    with pytest.raises(InputError, match="serves policy \\(from other/name\\), not org/name"):
        find_model([{"id": "policy", "root": "other/name"}], settings_for("org/name"), "URL")


def test_an_adapter_is_asked_for_by_the_name_of_its_folder(tmp_path):
    adapter = tmp_path / "lora7"
    cards = [{"id": "tiny", "max_model_len": 64}, {"id": "lora7", "parent": "tiny", "root": str(adapter)}]
    assert find_model(cards, settings_for("tiny", adapter=str(adapter)), "URL") == "lora7"
    assert find_model(cards, settings_for("tiny"), "URL") == "tiny"
    with pytest.raises(InputError, match=r"no adapter lora8: start it with --enable-lora --lora-modules lora8=/"):
        find_model(cards, settings_for("tiny", adapter="lora8"), "URL")
    with pytest.raises(InputError, match="not base"):
        find_model(cards, settings_for("base", adapter=str(adapter)), "URL")


def test_the_context_of_the_server_must_suffice(server, connect):
    connect(max_model_len=64)
    with pytest.raises(
        InputError, match=r"at most 64 tokens, but a prompt and its response may take 65.*--max-model-len 65"
    ):
        connect(max_model_len=65)
    assert server.bodies == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": None}, "needs the address of a running server: pass --base_url http://host:port/v1"),
        ({"base_url": "127.0.0.1:8000/v1"}, "is not the address of a server"),
        ({"base_url": "ftp://host/v1"}, "ftp://host/v1 is not the address of a server"),
        ({"base_url": "http://me:secret@host/v1"}, "contains a user name or password: remove it"),
        ({"model": "huge"}, "serves tiny, not huge: start one that lists it as huge, such as `vllm serve huge"),
        ({"dtype": "float32"}, "dtype is float32.*start the server with --dtype float32"),
        ({"tensor_parallel_size": 2}, "leave it at 1 here"),
        ({"batch_invariant": True}, "start the server with VLLM_BATCH_INVARIANT=1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_generated(server, connect, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        connect(**changes)
    assert server.bodies == [] and "secret" not in str(caught.value)


def test_a_server_that_is_not_there_or_another_kind_is_refused(server, connect, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(InputError, match=f"{nobody} did not answer .* after 4 tries .*: start it"):
            connect(base_url=nobody)
    with pytest.raises(InputError, match="HTTP 404: Not Found: base_url must be the address"):
        connect(base_url=server.url.removesuffix("/v1"))
    for models in ({"models": []}, [], {"data": ["tiny"]}, {"data": [{"name": "tiny"}]}):
        server.models = models
        with pytest.raises(InputError, match="/models lists no models"):
            connect()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\x07secret")
    with pytest.raises(InputError, match="contains characters that are not allowed in a key") as caught:
        connect()
    assert "secret" not in str(caught.value)


def test_proxies_are_for_other_machines_only(server, connect, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        connect(base_url=f"{server.url}/")  # the proxy is dead, so it was not asked
    # Here the server is the proxy and is asked for an address of another machine.
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
    assert ids_of(connect(base_url="http://models.example/v1").generate(REQUESTS, SAMPLING)) == expected(REQUESTS)
    assert server.targets == ["/v1/models", "http://models.example/v1/models"]


def test_loopback_addresses_are_known():
    assert all(map(is_this_machine, ("localhost", "127.0.0.1", "127.8.8.8", "::1", "a.localhost", "0.0.0.0")))
    assert not any(map(is_this_machine, ("example.org", "10.0.0.1", "fe80::1", "localhost.example.org")))


def test_the_wait_doubles_up_to_a_limit_and_never_undercuts_the_server():
    policy = RetryPolicy(first_delay=1.0, max_delay=10.0, max_retry_after=100.0)
    for failures, full in ((1, 1.0), (2, 2.0), (4, 8.0), (5, 10.0), (500, 10.0)):
        waits = [policy.delay(failures) for _ in range(50)]
        assert all(full / 2 <= wait <= full for wait in waits) and len(set(waits)) > 1
    assert policy.delay(1, retry_after=30.0) == 30.0 and policy.delay(1, retry_after=1e6) == 100.0
    assert 5.0 <= policy.delay(5, retry_after=1.0) <= 10.0
    assert retry_after_delay(None) is None and retry_after_delay("soon") is None
    assert retry_after_delay("7") == 7.0 and retry_after_delay("-1") == 0.0
    assert 57.0 < (retry_after_delay(email.utils.formatdate(time.time() + 60, usegmt=True)) or 0.0) <= 60.0


def test_the_backend_is_in_the_registry_and_closes_twice(server):
    backend = make_backend("openai", BackendSettings("tiny", stop_ids=[STOP], base_url=server.url))
    assert isinstance(backend, OpenAIBackend) and backend.batch_size == 64
    backend.close()
    backend.close()
    assert not backend.link._thread.is_alive()
