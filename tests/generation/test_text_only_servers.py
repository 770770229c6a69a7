"""Servers that return text and no token ids: how prompts are sent, how text becomes ids, and what is checked and said."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.generation import PromptRequest, SamplingConfig, sample_seed
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.openai.backend import OpenAIBackend
from tests.helpers import CHATML, char_tokenizer
from tests.helpers.fake_openai_server import FakeServer
from tests.helpers.openai_backend import QUICK

SAMPLING = SamplingConfig(num_samples=2, temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=12, seed=7)
ONE = replace(SAMPLING, num_samples=1)


def encoder(bos: bool = False) -> ChatEncoder:
    """A tokenizer of one token per character; with ``bos`` its template writes one, as Llama's does."""
    special = ("<s>", "<|im_start|>", "<|im_end|>") if bos else ("<|im_start|>", "<|im_end|>")
    more = {"bos_token": "<s>"} if bos else {}
    return ChatEncoder(char_tokenizer(special, "<s>" + CHATML if bos else CHATML, **more))


def requests_of(made: ChatEncoder) -> list[PromptRequest]:
    texts = ("hello", "say it", "two\nlines")
    return [
        PromptRequest(f"p{n}", made.prompt_ids([{"role": "user", "content": text}])) for n, text in enumerate(texts)
    ]


class TextServer(FakeServer):
    """Answers with text, as SGLang and llama.cpp do; ``takes_ids`` and ``adds_bos`` are how it reads prompts."""

    def __init__(self, made: ChatEncoder, takes_ids: bool = True, adds_bos: bool = False) -> None:
        super().__init__()
        self.made, self.takes_ids, self.adds_bos = made, takes_ids, adds_bos
        self.changes: dict[str, Any] = {}
        self.behave = self.answer

    def answer(self, handler: Any, body: dict[str, Any]) -> bool:
        if not isinstance(body["prompt"], str) and not self.takes_ids:
            return handler.say(422, {"error": {"message": "prompt must be a string"}})
        read = body["prompt"]
        if isinstance(read, str):
            read = [*self._bos(), *self.made.tokenizer(read, add_special_tokens=False)["input_ids"]]
        text, reason, sampled = said(read, body["seed"], body["max_tokens"])
        usage = {"prompt_tokens": len(read), "completion_tokens": sampled}
        choice = {"index": 0, "text": text, "finish_reason": reason} | self.changes
        return handler.say(200, {"choices": [choice], "usage": usage})

    def _bos(self) -> list[int]:
        return [self.made.tokenizer.bos_token_id] if self.adds_bos else []


def said(prompt: list[int], seed: int, limit: int) -> tuple[str, str, int]:
    """The text, reason and sampled tokens of an answer; it ends in about half of the cases."""
    digest = hashlib.sha256(json.dumps([prompt, seed]).encode()).hexdigest()
    return (digest[:limit], "length", limit) if digest[-1] < "8" else (digest[:4], "stop", 5)


@pytest.fixture
def connect():
    made: list[Any] = []

    def make(own: ChatEncoder, **server: Any) -> tuple[TextServer, OpenAIBackend]:
        fake = TextServer(own, **server)
        settings = BackendSettings(
            "tiny", stop_ids=own.stop_ids, base_url=fake.url, token_ids="from_text", encoder=own, decode=own.decode
        )
        made.extend([OpenAIBackend(settings, QUICK, first_contact=QUICK), fake])
        return fake, made[-2]

    yield make
    for item in made:
        item.close()


def expected(own: ChatEncoder, requests: list[PromptRequest], sampling: SamplingConfig = SAMPLING):
    """Ids written out by hand: the characters, and the end of turn behind those that stopped."""
    rows = []
    for request in requests:
        row = []
        for sample in range(sampling.num_samples):
            seed = sample_seed(sampling.seed, request.prompt_id, sample) % 2**31
            text, reason, _ = said(list(request.token_ids), seed, sampling.max_new_tokens)
            ids = [own.tokenizer.convert_tokens_to_ids(letter) for letter in text]
            row.append((ids + [own.tokenizer.eos_token_id] * (reason == "stop"), reason))
        rows.append(row)
    return rows


def found(rows):
    return [[(response.token_ids, response.finish_reason) for response in row] for row in rows]


@pytest.mark.parametrize(
    ("server", "bos", "kind", "tries"),
    [
        ({"takes_ids": True}, True, list, 1),
        ({"takes_ids": False}, True, str, 2),
        ({"takes_ids": False, "adds_bos": True}, True, str, 3),
        ({"takes_ids": False}, False, str, 2),
    ],
)
def test_prompts_are_read_as_they_are_encoded_here(connect, server, bos, kind, tries):
    own = encoder(bos)
    fake, backend = connect(own, **server)
    requests = requests_of(own)
    rows = found(backend.generate(requests, SAMPLING))
    assert rows == expected(own, requests)
    assert {reason for row in rows for _, reason in row} == {"stop", "length"}
    bodies = fake.bodies[tries:]  # behind the trials with one token
    assert len(bodies) == 6 and all(isinstance(body["prompt"], kind) for body in bodies)
    assert [body["max_tokens"] for body in fake.bodies[:tries]] == [1] * tries
    if kind is str:
        text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        assert bodies[0]["prompt"] == ("<s>" if bos and not fake.adds_bos else "") + text


def test_every_setting_is_off_for_every_kind_of_server(connect):
    fake, backend = connect(encoder())
    backend.generate(requests_of(encoder())[:1], SamplingConfig(max_new_tokens=9, seed=3))
    body = fake.bodies[-1]
    assert body.pop("prompt") == list(requests_of(encoder())[0].token_ids)
    assert body == {
        "model": "tiny",
        "add_special_tokens": False,
        "n": 1,
        "stream": False,
        "max_tokens": 9,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": sample_seed(3, "p0", 0) % 2**31,
        "stop": ["<|im_end|>"],
        "skip_special_tokens": False,
    }


@pytest.mark.parametrize(
    ("changes", "text", "reason"),
    [
        ({"text": "abc", "finish_reason": "length"}, "abc", "length"),
        ({"text": "abc", "finish_reason": "stop"}, "abc<|im_end|>", "stop"),
        ({"text": "abc<|im_end|>", "finish_reason": "stop"}, "abc<|im_end|>", "stop"),
        ({"text": "abc<|im_end|>more", "finish_reason": "length"}, "abc<|im_end|>", "stop"),
        ({"text": "", "finish_reason": "stop"}, "<|im_end|>", "stop"),
        ({"text": "a" * 12, "finish_reason": "stop"}, "a" * 12, "length"),  # no token is left for the end
    ],
)
def test_the_end_of_turn_is_the_templates(connect, changes, text, reason):
    own = encoder()
    fake, backend = connect(own)
    fake.changes = changes
    (response,) = backend.generate(requests_of(own)[:1], ONE)[0]
    assert response.token_ids == own.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert response.finish_reason == reason and response.logprobs is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"finish_reason": "content_filter"}, "did not finish prompt p0: the finish reason is 'content_filter'"),
        ({"text": None}, "returned no text for prompt p0"),
        ({"text": "", "finish_reason": "length"}, "returned an empty text for prompt p0"),
    ],
)
def test_answers_that_are_no_response_are_refused(connect, changes, sentence):
    fake, backend = connect(encoder())
    fake.changes = changes
    with pytest.raises(InputError, match=sentence):
        backend.generate(requests_of(encoder())[:1], ONE)


def test_a_server_that_reads_something_else_is_refused(connect):
    own = encoder(bos=True)
    fake, backend = connect(own)
    counted = iter([10**6, 10**6, 10**6])
    fake.behave = lambda handler, body: handler.say(
        200, {"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"prompt_tokens": next(counted)}}
    )
    with pytest.raises(
        InputError, match=r"does not read prompts as they are encoded here .*read 1000000 tokens of prompt p0"
    ):
        backend.generate(requests_of(own), SAMPLING)
    fake.behave = lambda handler, body: handler.say(200, {"choices": [{"text": "a", "finish_reason": "stop"}]})
    with pytest.raises(InputError, match=r"does not say how many tokens .*usage.prompt_tokens"):
        backend.generate(requests_of(own), SAMPLING)
    fake.behave = lambda handler, body: handler.say(404, {"detail": "Not Found"})
    with pytest.raises(InputError, match=r"HTTP 404: Not Found.*an endpoint for chats alone cannot be used"):
        backend.generate(requests_of(own), SAMPLING)


def test_a_later_prompt_that_is_read_otherwise_is_refused(connect):
    own = encoder()
    fake, backend = connect(own, takes_ids=False)
    requests = requests_of(own)
    longer = [PromptRequest("long", requests[1].token_ids)]
    backend.generate(requests[:1], ONE)
    fake.adds_bos, fake.made = True, encoder(bos=True)
    with pytest.raises(InputError, match="tokens of prompt long, which has"):
        backend.generate(longer, ONE)


def test_a_prompt_that_no_text_spells_is_named(connect):
    own = encoder()
    _, backend = connect(own, takes_ids=False)
    letters = [own.tokenizer.convert_tokens_to_ids(letter) for letter in "<|im_end|>"]  # text, and no end of turn
    ids = [*requests_of(own)[0].token_ids, *letters]
    backend.generate(requests_of(own)[:1], ONE)
    with pytest.raises(InputError, match="prompt tricky cannot be sent as text"):
        backend.generate([PromptRequest("tricky", ids)], ONE)


def test_a_busy_server_is_asked_again_once_per_form(connect):
    own = encoder()
    fake, backend = connect(own)
    failures = iter(["busy"] * 3)
    fake.behave = lambda handler, body: (
        handler.say(429, b"", Retry_After="0") if next(failures, None) else fake.answer(handler, body)
    )
    assert found(backend.generate(requests_of(own)[:1], SAMPLING)) == expected(own, requests_of(own)[:1])
    assert all(isinstance(body["prompt"], list) for body in fake.bodies)


def test_it_is_said_once_and_other_lengths_are_counted(connect, capsys):
    own = encoder()
    fake, backend = connect(own)
    fake.changes = {"text": "a longer text than was sampled"[:12], "finish_reason": "length"}
    backend.generate(requests_of(own), ONE)
    backend.close()
    lines = capsys.readouterr().err.splitlines()
    assert (
        len([line for line in lines if "token_ids is from_text" in line and "can differ from the sampled ones" in line])
        == 1
    )
    stopped = sum(sample[0][1] == "stop" for sample in expected(own, requests_of(own), ONE))
    told = [line for line in lines if "of 3 responses have another number of tokens" in line]
    assert stopped and told and f"{stopped} of 3" in told[0]


def test_the_rows_say_where_their_ids_come_from(tmp_path, tiny_model):
    """A whole generation, and its pairs: refused without the setting, recorded with it."""
    from spin.alignment.core.parquet import open_parquet
    from spin.alignment.core.provenance import read_provenance
    from spin.convert_data import main as convert
    from spin.generate import main
    from tests.helpers import run_main

    own = ChatEncoder(char_tokenizer())
    data = tmp_path / "data.jsonl"
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in ("hello", "bye")]
    data.write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))
    fake = TextServer(own)
    fake.models = {"data": [{"id": tiny_model.name}]}
    flags = ["--model", tiny_model, "--input_dir", data, "--output_dir", tmp_path / "out", "--max_new_tokens", 8]
    flags += ["--backend", "openai", "--base_url", fake.url]
    try:
        code, _, error = run_main(main, *flags)
        assert code == 2 and "returned text but no token ids" in error and "token_ids: from_text" in error
        code, _, error = run_main(main, *flags, "--token_ids", "from_text")
        assert code == 0 and error.count("token_ids is from_text") == 1, error
        code, _, error = run_main(main, *flags, "--token_ids", "from_text", "--logprobs")
        assert code == 2 and "token_ids is from_text, but logprobs needs log-probs of the sampled tokens" in error
    finally:
        fake.close()
    code, _, error = run_main(convert, "--input_dir", tmp_path / "out", "--output_dir", tmp_path / "pairs")
    assert code == 0, error
    for path in (tmp_path / "out" / "train-00000.parquet", *(tmp_path / "pairs").glob("*.parquet")):
        assert read_provenance(open_parquet(path).schema_arrow, path).sampling["token_ids"] == "from_text"
    rows = open_parquet(tmp_path / "out" / "train-00000.parquet").read().to_pylist()
    for row in rows:
        assert own.decode(row["rejected_token_ids"]) == row["rejected"][-1]["content"]


def test_the_setting_is_for_servers():
    from spin.alignment.generation.config import GenerateConfig

    with pytest.raises(InputError, match="token_ids is for openai: backend transformers does not use it"):
        GenerateConfig(model="m", input_dir="i", output_dir="o", token_ids="from_text")
