"""A fake server, a backend connected to it, and the requests of the tests of the openai backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from spin.alignment.core.server_link import RetryPolicy
from spin.alignment.generation import PromptRequest, SamplingConfig, sample_seed
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.openai.backend import OpenAIBackend
from tests.helpers.fake_openai_server import FakeServer, answer_to

STOP = 3
QUICK = RetryPolicy(attempts=4, first_delay=0.01, timeout=5.0)
SAMPLING = SamplingConfig(num_samples=2, max_new_tokens=8, seed=7)
REQUESTS = [
    PromptRequest(f"p{number}", tuple(range(5, 5 + length))) for number, length in enumerate([3, 9, 1, 6, 6, 12, 2])
]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


@pytest.fixture
def connect(server: FakeServer) -> Iterator[Callable[..., OpenAIBackend]]:
    """Make backends of the server; all are closed at the end."""
    made: list[OpenAIBackend] = []

    def make(policy: RetryPolicy = QUICK, **changes: Any) -> OpenAIBackend:
        settings = BackendSettings("tiny", stop_ids=[STOP], base_url=server.url)
        made.append(OpenAIBackend(replace(settings, **changes), policy, first_contact=QUICK))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


def expected(requests: list[PromptRequest], sampling: SamplingConfig = SAMPLING) -> list[list[list[int]]]:
    rows = []
    for request in requests:
        seeds = [sample_seed(sampling.seed, request.prompt_id, sample) for sample in range(sampling.num_samples)]
        common = {"prompt": list(request.token_ids), "max_tokens": sampling.max_new_tokens, "stop_token_ids": [STOP]}
        rows.append([answer_to(common | {"seed": seed})["choices"][0]["token_ids"] for seed in seeds])
    return rows


def until(there: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something is so.

    Raises:
        AssertionError: it is not so in time.
    """
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)


def ids_of(rows: list[list[Any]]) -> list[list[list[int]]]:
    return [[response.token_ids for response in row] for row in rows]
