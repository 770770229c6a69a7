"""Rows built column by column, prompts encoded and responses decoded in batches: the same as one by one, to the byte."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from spin.alignment.core.allocator import frozen_objects
from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import ParquetSink
from spin.alignment.core.provenance import Provenance
from spin.alignment.data import prompt_store
from spin.alignment.data.chat_encoder import ChatEncoder, load_encoder, template_arguments
from spin.alignment.data.prompt_store import PromptStore
from spin.alignment.data.rows import GENERATED_SCHEMA, OPTIONAL_COLUMNS, carried_columns
from spin.alignment.data.tokenizer_calls import decode_ids, encode_texts
from spin.alignment.data.turns import prompt_turns
from spin.alignment.generation.base import Response
from spin.alignment.generation.fraction_journal import FractionJournal
from spin.alignment.generation.response_rows import response_table
from tests.helpers.smollm2 import smollm2_folder

MADE = Provenance("generated", model="m")
USER, TEXTS = {"role": "user"}, ("Say so", "two  words ", "naïve 🙂 日本", "a\n\nb", "x" * 300)


def foreign_rows(rich: bool) -> list[dict[str, Any]]:
    """Rows with and without a ground truth, of one and of several turns; ``rich`` ones also have rare fields and columns."""
    rows = []
    for number in range(11):
        turns = [{**USER, "content": f"{number} {TEXTS[number % len(TEXTS)]}"}]
        if number % 4 == 1:
            turns = [{"role": "system", "content": "Be brief."}, *turns]
        if number % 3 == 1:
            turns += [{"role": "assistant", "content": f"no {number}"}, {**USER, "content": "sure?"}]
        if number % 5 != 2:
            turns.append({"role": "assistant", "content": f"yes {number}"})
            if rich and number % 2:
                turns[-1]["reasoning_content"] = "hm"
        more = {"difficulty": number} if rich and number % 3 == 0 else {}
        rows.append({"prompt_id": f"q{number}", "messages": turns, **more})
    return rows


def store_of(folder: Path, rows: list[dict[str, Any]]) -> PromptStore:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptStore.open(folder / "parts" / "prompts.arrow", str(folder / "train.jsonl"), "train")


@pytest.fixture(params=[False, True], ids=["plain", "rich"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PromptStore:
    monkeypatch.setattr(prompt_store, "_ROWS", 4)  # several batches of a few rows
    return store_of(tmp_path, foreign_rows(request.param))


def one_row(row: dict[str, Any], sample: int, response: Response, text: str) -> dict[str, Any]:
    """A generated row as the row contract says, written out."""
    prompt = prompt_turns(row["chosen"])
    return {
        "prompt_id": row["prompt_id"],
        "sample_index": sample,
        "chosen": row["chosen"] if len(prompt) < len(row["chosen"]) else None,
        "rejected": [*prompt, {"role": "assistant", "content": text}],
        "rejected_token_ids": response.token_ids,
        "rejected_finish_reason": response.finish_reason,
        "rejected_logprobs": response.logprobs,
        **carried_columns(row),
    }


def test_rows_come_in_the_order_asked_for(store):
    rows = store.rows(range(11))
    assert [row["prompt_id"] for row in rows] == [f"q{number}" for number in range(11)]
    for indices in ([7], [10, 0, 4, 3], [5, 5, 1], random.Random(0).sample(range(11), 11)):
        assert store.rows(indices) == [rows[index] for index in indices]
        assert store.table(indices).num_rows == len(indices)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("logprobs", [False, True])
def test_a_table_of_rows_and_its_file_are_those_of_rows_one_by_one(store, samples, logprobs, tmp_path):
    schema = store.features.extend(GENERATED_SCHEMA)
    if logprobs:
        schema = schema.append(pa.field("rejected_logprobs", OPTIONAL_COLUMNS["rejected_logprobs"]))
    draw = random.Random(1)
    indices = draw.sample(range(11), 8)
    responses = [
        [
            Response([draw.randrange(900) for _ in range(length)], "stop", [-0.5] * length if logprobs else None)
            for length in (draw.randrange(4) for _ in range(samples))
        ]
        for _ in indices
    ]
    texts = [f"{TEXTS[number % len(TEXTS)]}{number}" for number in range(8 * samples)]
    table = response_table(store.table(indices), responses, texts, schema)
    expected = [
        one_row(row, sample, response, texts[place * samples + sample])
        for place, (row, some) in enumerate(zip(store.rows(indices), responses, strict=True))
        for sample, response in enumerate(some)
    ]
    table.validate(full=True)
    assert table.equals(pa.Table.from_pylist(expected, schema))
    for name, rows in (("columns", table), ("rows", expected)):
        with ParquetSink(tmp_path / name, schema, MADE) as sink:
            sink.write(rows)
    assert (tmp_path / "columns").read_bytes() == (tmp_path / "rows").read_bytes()


def test_a_file_merged_from_memory_is_that_merged_from_the_parts(store, tmp_path):
    schema = store.features.extend(GENERATED_SCHEMA)
    contents = []
    for reread in (False, True):
        folder = tmp_path / str(reread)
        folder.mkdir()
        journal = FractionJournal(folder / "train-00000.parquet", schema, MADE, 11)
        journal.open()
        for positions in ([1, 4, 6, 9], [0, 2, 10], [3, 5, 7, 8]):
            some = [[Response([position, 3], "stop")] for position in positions]
            texts = [f"text {position}" for position in positions]
            journal.write("w", positions, response_table(store.table(positions), some, texts, schema))
        if reread:
            journal = FractionJournal(journal.path, schema, MADE, 11)
            journal.open()
        assert journal.is_complete()
        journal.merge()
        contents.append(journal.path.read_bytes())
    assert contents[0] == contents[1]


def check_encoder(encoder: ChatEncoder, prompts: list[tuple[list[dict[str, str]], dict[str, str]]]) -> list[Any]:
    """Compare the ids of prompts together with those of each alone, and the texts of responses; return the former."""
    together = encoder.ids_of_prompts(prompts)
    assert len(together) == len(prompts)
    for (turns, arguments), found in zip(prompts, together, strict=True):
        if isinstance(found, InputError):
            with pytest.raises(type(found), match=r".") as raised:
                encoder.prompt_ids(turns, **arguments)
            assert str(raised.value) == str(found)
        else:
            assert found == encoder.prompt_ids(turns, **arguments)
    draw = random.Random(2)
    last = len(encoder.tokenizer) - 1
    responses = [[draw.randint(0, last) for _ in range(length)] for length in (0, 1, 5, 60)]
    responses += [[*ids, encoder.end_id] for ids in responses]
    expected = [
        encoder.tokenizer.decode(
            [
                token
                for token in _until_end(ids, encoder)
                if token not in (encoder.pad_id, encoder.tokenizer.bos_token_id)
            ],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        for ids in responses
    ]
    assert [encoder.raw_text(ids) for ids in responses] == expected
    assert encoder.response_texts(responses) == [encoder.response_text(ids) for ids in responses]
    return together


def _until_end(ids: list[int], encoder: ChatEncoder) -> list[int]:
    while ids and ids[-1] in encoder.stop_ids:
        ids = ids[:-1]
    return ids


def with_a_control_token(rows: list[dict[str, Any]], token: str) -> list[tuple[list[dict[str, str]], dict[str, str]]]:
    prompts = [(prompt_turns(row["chosen"]), template_arguments(row)) for row in rows]
    return [*prompts[:3], ([{**USER, "content": f"say {token} now"}], {}), *prompts[3:], ([], {})]


def test_prompts_encoded_together_have_the_ids_of_each_alone(store, tiny_model):
    encoder = load_encoder(tiny_model)
    end = encoder.tokenizer.convert_ids_to_tokens(encoder.end_id)
    encoder.tokenizer("a b c d", truncation=True, max_length=2)  # must not apply to what comes after it
    found = check_encoder(encoder, with_a_control_token(store.rows(range(11)), end))
    refused = [str(item) for item in found if isinstance(item, InputError)]
    assert len(refused) == 2 and "control token" in refused[0] and "must end with a user turn" in refused[1]


def test_the_same_holds_for_a_real_tokenizer(store):
    encoder = load_encoder(smollm2_folder())
    found = check_encoder(encoder, with_a_control_token(store.rows(range(11)), "<|im_end|>"))
    assert sum(isinstance(item, list) for item in found) == 11


def test_a_tokenizer_with_ways_of_its_own_is_asked_text_by_text(tiny_model):
    tokenizer = load_encoder(tiny_model).tokenizer
    plain = encode_texts(tokenizer, ["a b", "c"])

    class Reversed(type(tokenizer)):
        def __call__(self, text: str, **more: Any) -> Any:
            return super().__call__(text[::-1], **more)

        def decode(self, ids: list[int], **more: Any) -> str:
            return super().decode(ids, **more)[::-1]

    texts = [decode_ids(tokenizer, [ids])[0] for ids in plain]
    tokenizer.__class__ = Reversed
    assert encode_texts(tokenizer, ["b a", "c"]) == plain and encode_texts(tokenizer, []) == []
    assert decode_ids(tokenizer, plain) == [text[::-1] for text in texts]


def test_the_garbage_collector_leaves_old_objects_alone_for_a_while():
    before = gc.get_freeze_count()
    with frozen_objects():
        assert gc.get_freeze_count() > before + 1000
    assert gc.get_freeze_count() == 0
