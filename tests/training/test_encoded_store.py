"""The store of encoded rows: made once, whole or not at all, another one for other inputs, and the rows of encoding in memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import time
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from spin.alignment.core import arrow_rows, remarks
from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_json, hash_text
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.data.config import DataConfig
from spin.alignment.data.pair_files import pair_mixtures
from spin.alignment.data.preferences import mix_preferences
from spin.alignment.data.rows import PREFERENCE_SCHEMA
from spin.alignment.logprobs.reference_store import hash_tokens
from spin.alignment.methods.losses import find_loss
from spin.alignment.training import encoded_store, preference_data
from spin.alignment.training.accounting import Account
from spin.alignment.training.encode_rows import workers_for
from spin.alignment.training.encoded_store import Spool, cache_folder, is_shared, open_store, private_store, write_split
from spin.alignment.training.preference_data import encode_rows, joined_key, load_pairs
from spin.alignment.training.sft_data import CONTENT, load_ground_truth
from spin.alignment.training.sft_rows import with_labels
from tests.helpers import char_tokenizer
from tests.helpers.training import data_key

FORK = multiprocessing.get_context("fork")
SCHEMA = pa.schema([("number", pa.int64())])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache; the stores in it are its subfolders."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return cache_folder()


def maker(log: Path, seconds: float = 0.0, killed: bool = False):
    """Return a function that makes a store of three rows and leaves a line in ``log``."""

    def make(folder: Path):
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(seconds)
        write_split(folder, "train", SCHEMA, [pa.record_batch([[3, 1, 2]], SCHEMA)])
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"train": (Account(rows=3, kept=3), {"tokens": "abc"})}

    return make


def numbers(store) -> list[int]:
    return store["train"].rows["number"][:]


def test_several_processes_make_it_once(tmp_path, cache, capfd):
    log = tmp_path / "log"

    def work():
        assert numbers(open_store({"kind": "test"}, maker(log, seconds=0.3))) == [3, 1, 2]

    processes = [FORK.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "made\n"
    assert capfd.readouterr().err.count("waiting for the process that encodes the data") == 2
    found = open_store({"kind": "test"}, maker(log))["train"]
    assert log.read_text() == "made\n" and found.hashes == {"tokens": "abc"} and found.account.kept == 3


def test_a_killed_maker_leaves_nothing_that_is_used(tmp_path, cache):
    log = tmp_path / "log"
    process = FORK.Process(target=lambda: open_store({"kind": "test"}, maker(log, killed=True)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (folder,) = cache.iterdir()
    (folder / "train.spool").write_bytes(b"half")
    assert numbers(open_store({"kind": "test"}, maker(log))) == [3, 1, 2] and log.read_text() == "made\nmade\n"
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {"store.json", "train.arrow"}


@pytest.mark.parametrize("name", ["train.arrow", "store.json"])
def test_a_damaged_store_is_named_and_made_again(tmp_path, cache, capfd, name):
    log = tmp_path / "log"
    open_store({"kind": "test"}, maker(log))
    (folder,) = cache.iterdir()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert numbers(open_store({"kind": "test"}, maker(log))) == [3, 1, 2]
    assert log.read_text() == "made\nmade\n"
    assert capfd.readouterr().err == f"{folder} is damaged: the data is encoded again\n"


def test_a_store_that_fails_leaves_no_files_and_old_ones_are_removed(tmp_path, cache):
    open_store({"kind": "old"}, maker(tmp_path / "log"))
    (old,) = cache.iterdir()
    os.utime(old / "store.json", (1e9, 1e9))

    def fails(folder: Path):
        (folder / "train.spool").write_bytes(b"half")
        raise InputError("row 3 is bad")

    with pytest.raises(InputError, match="row 3"):
        open_store({"kind": "bad"}, fails)
    assert not [path for path in cache.rglob("*") if path.name in ("train.spool", "train.arrow") and path.parent != old]
    open_store({"kind": "new"}, maker(tmp_path / "log"))
    assert not old.exists()


def test_a_private_store_can_be_read_after_its_folder(tmp_path, cache):
    found = private_store(maker(tmp_path / "log"))
    assert list(cache.iterdir()) == [] and numbers(found) == [3, 1, 2]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=f"HF_DATASETS_CACHE.*{tmp_path}/file, which is a file"):
        open_store({"kind": "test"}, maker(tmp_path / "log"))


@pytest.mark.parametrize(("name", "limit"), [("ROWS", 7), ("BYTES", 200)])
def test_rows_are_read_back_in_any_order(tmp_path, monkeypatch, name, limit):
    monkeypatch.setattr(arrow_rows, name, limit)
    rows = [{"ids": list(range(number % 5)), "name": f"n{number}"} for number in range(100)]
    schema = pa.schema([("ids", pa.list_(pa.int32())), ("name", pa.string())])
    spool = Spool(tmp_path / "spool", schema)
    spool.write(pa.RecordBatch.from_pylist(rows[start : start + 3], schema) for start in range(0, 100, 3))
    order = np.random.default_rng(0).permutation(100)[:60]
    batches = list(spool.in_order(order))
    assert 8 <= max(batch.num_rows for batch in batches) + 1 <= 20
    found = [row for batch in batches for row in batch.to_pylist()]
    assert found == [rows[place] for place in order]


def test_remarks_are_repeated_where_the_store_is_used_and_only_by_the_first_process(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        json.dumps({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": 0.5}) + "\n"
    )
    line = f"{folder}/train.jsonl: ignored columns: margin\n"
    encoder = ChatEncoder(char_tokenizer())
    for rank, expected in (("1", ""), ("0", line), ("0", line), ("1", "")):  # the first makes it
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(remarks, "_said", set())  # as in a process of its own
        load_pairs(settings({folder: 1.0}), encoder)
        assert capfd.readouterr().err == expected
    (folder / "train.jsonl").write_text(
        json.dumps({"prompt": "Q", "chosen": "a<|im_end|>", "rejected": "b", "margin": 0.5}) + "\n"
    )
    with pytest.raises(InputError, match="no pair remains"):
        load_pairs(settings({folder: 1.0}), encoder)
    assert capfd.readouterr().err == line  # what may explain the error is not lost


def test_processes_that_do_not_wait_do_not_multiply(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    config = DataConfig(dataset_mixer={"a/hub-set": 1.0}, preprocessing_num_workers=3)
    assert workers_for(5000, config, is_shared(config)) == 3  # each of the 8 makes a store of its own
    assert workers_for(5000, config, others_wait=True) == 8 and workers_for(500, config, others_wait=True) == 1


def test_a_batch_is_sent_to_a_worker_without_the_rest_of_its_file(tmp_path):
    rows = [{"prompt": f"Q{n}", "chosen": "yes " * 20, "rejected": f"no {n}"} for n in range(2100)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = pair_mixtures({str(tmp_path): 1.0}, ["train"], 0)["train"]
    sizes = [len(pickle.dumps(batch.rows)) / batch.rows.num_rows for batch in mixture.batches()]
    assert len(sizes) == 3 and max(sizes) < 2 * min(sizes)


# --- pairs ---


def pair(number: int, chosen: str = "ab", **columns) -> dict:
    prompt = [{"role": "user", "content": f"question {number}"}]
    answers = {"chosen": chosen, "rejected": "no " * (1 + number % 7)}
    turns = {side: [*prompt, {"role": "assistant", "content": text}] for side, text in answers.items()}
    return {"prompt_id": f"p{number}", "sample_index": 0, **turns, "rejected_finish_reason": "stop", **columns}


def write_pairs(folder: Path, rows: list[dict], split: str = "train_prefs", files: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(files):
        table = pa.Table.from_pylist(rows[number::files], PREFERENCE_SCHEMA)
        pq.write_table(table, folder / f"{split}-{number:05d}-of-{files:05d}.parquet", row_group_size=9)
    return folder


def settings(mixer: dict[Path, float], seed: int = 3, loss: str = "sigmoid", reverse: bool = False, **data):
    values = {"dataset_splits": ["train_prefs"], "max_length": 60, "max_prompt_length": 30} | data
    config = DataConfig(dataset_mixer={str(path): fraction for path, fraction in mixer.items()}, **values)
    arguments = types.SimpleNamespace(seed=seed, loss_type=loss, loss=find_loss(loss), reverse=reverse)
    return types.SimpleNamespace(data=config, arguments=arguments)


@pytest.fixture
def mixture(tmp_path):
    """Two data sets, one in two files and of which half is used, the other with rows in another form; some rows are dropped."""
    own = write_pairs(
        tmp_path / "own", [pair(n, "a<|im_end|>" if n % 10 == 3 else "x" * (n + 1)) for n in range(90)], files=2
    )
    write_pairs(own, [pair(n) for n in range(100, 112)], split="test_prefs")
    other = tmp_path / "other"
    other.mkdir()
    rows = [{"prompt": f"Q{n}", "chosen": "yes", "rejected": f"no {n}"} for n in range(25)]
    (other / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (other / "test.jsonl").write_text(json.dumps({"prompt": "Q", "chosen": "a", "rejected": "b"}))
    return {own: 0.5, other: 1.0}


def test_the_rows_are_those_of_encoding_in_memory(mixture):
    encoder = ChatEncoder(char_tokenizer())
    wanted = settings(mixture, dataset_splits=["train_prefs", "test_prefs"])
    found = load_pairs(wanted, encoder)
    mixed = mix_preferences(wanted.data.dataset_mixer, wanted.data.dataset_splits, 3)
    expected = {use: encode_rows(rows, encoder, wanted.data) for use, rows in mixed.items()}
    assert found.keys() == expected.keys() == {"train", "test"}
    for use, (rows, account) in expected.items():
        assert found[use].rows.to_list() == rows.to_list() and len(rows) > 5
        assert found[use].account.record() == account.record()
        assert found[use].rows.cache_files  # on disk, not in memory
    assert sum(found["train"].account.dropped.values()) and found["train"].account.truncated["responses"]
    hashes = {use: split.hashes for use, split in found.items()}
    assert joined_key(hashes) == data_key({use: rows for use, (rows, _) in expected.items()})


def test_hashes_are_those_of_earlier_versions(mixture):
    found = load_pairs(settings(mixture), ChatEncoder(char_tokenizer()))["train"]
    ids = [
        np.asarray(row[f"{name}_ids"], np.int32).tobytes().hex()
        for row in found.rows
        for name in ("prompt", "chosen", "rejected")
    ]
    assert found.hashes["tokens"] == hash_tokens(found.rows) == hash_text(*ids)
    backwards = found.rows.select(range(len(found.rows) - 1, -1, -1))
    assert hash_tokens(backwards) == hash_text(
        *(ids[3 * n + k] for n in reversed(range(len(ids) // 3)) for k in range(3))
    )


def test_several_workers_write_the_same_rows(tmp_path, cache):
    folder = write_pairs(tmp_path / "pairs", [pair(n) for n in range(1100)])
    encoder = ChatEncoder(char_tokenizer())
    alone = load_pairs(settings({folder: 1.0}), encoder)["train"]
    for store in cache.iterdir():
        (store / "store.json").unlink()
    several = load_pairs(settings({folder: 1.0}, preprocessing_num_workers=2), encoder)["train"]
    assert several.rows.to_list() == alone.rows.to_list() and several.hashes == alone.hashes
    assert len(list(cache.iterdir())) == 1  # the number of workers does not matter


def test_other_inputs_have_another_store(tmp_path, cache, monkeypatch):
    rows = [pair(n) for n in range(4)]
    folder = write_pairs(tmp_path / "pairs", rows)
    encoder, plain = ChatEncoder(char_tokenizer()), settings({folder: 1.0})

    def stores(wanted=plain, encoder=encoder) -> int:
        load_pairs(wanted, encoder)
        return len(list(cache.iterdir()))

    assert stores() == stores() == 1
    template = char_tokenizer()
    template.chat_template = template.chat_template.replace("<|im_end|>", "<|im_end|> ", 1)
    assert template.chat_template != encoder.tokenizer.chat_template
    assert stores(encoder=ChatEncoder(template)) == 2
    larger = char_tokenizer()
    larger.add_tokens(["question"])
    assert stores(encoder=ChatEncoder(larger)) == 3
    changes = [{"max_length": 61}, {"max_prompt_length": 31}, {"reverse": True}, {"seed": 4}, {"retokenize": True}]
    for number, change in enumerate(changes, start=4):
        assert stores(settings({folder: 1.0}, **change)) == number, change
    write_pairs(folder, [*rows[:3], pair(3, chosen="ac")])
    assert stores() == 9
    monkeypatch.setattr(encoded_store, "_code_key", lambda: {"code": "of another version"})
    assert stores() == 10


def test_bad_rows_are_named_with_their_file(tmp_path, cache):
    rows = [pair(n) for n in range(30)]
    rows[17]["rejected_token_ids"] = [5, 6, 7]
    wanted = settings({write_pairs(tmp_path / "pairs", rows): 1.0})
    encoder = ChatEncoder(char_tokenizer())
    with pytest.raises(InputError) as found:
        load_pairs(wanted, encoder)
    with pytest.raises(InputError) as expected:
        encode_rows(mix_preferences(wanted.data.dataset_mixer, ["train_prefs"], 3)["train"], encoder, wanted.data)
    place, _, reason = str(found.value).partition(" (prompt p17): rejected_token_ids do not")
    assert place.endswith("train_prefs-00000-of-00001.parquet row 17")  # of the file, not of the shuffled mixture
    assert reason and str(expected.value).endswith(reason)
    rows[17] = rows[3]
    with pytest.raises(InputError, match="contains sample 0 of prompt p3 2 times"):
        load_pairs(settings({write_pairs(tmp_path / "pairs", rows): 1.0}), encoder)
    rows[17] = pair(17) | {"rejected": [{"role": "assistant", "content": "?"}]}
    with pytest.raises(InputError, match=r"train_prefs-00000-of-00001.parquet row 17"):
        load_pairs(settings({write_pairs(tmp_path / "pairs", rows): 1.0}), encoder)
    assert not list(cache.rglob("*.spool")) and not list(cache.rglob("store.json"))


def test_rows_are_encoded_in_few_calls(tmp_path, monkeypatch):
    tokenizer, calls = char_tokenizer(), []
    encoder = ChatEncoder(tokenizer)
    whole = preference_data.PairEncoding.encode

    def counted(self, rows, places):
        calls.append(len(rows))
        return whole(self, rows, places)

    monkeypatch.setattr(preference_data.PairEncoding, "encode", counted)
    load_pairs(settings({write_pairs(tmp_path / "pairs", [pair(n) for n in range(50)]): 1.0}), encoder)
    assert sum(calls) == 50 and len(calls) < 5


# --- SFT ---


def test_sft_rows_are_stored_and_hashed_as_before(tmp_path, cache):
    folder = tmp_path / "sft"
    folder.mkdir()
    rows = [{"prompt": f"q{n}", "response": "" if n == 5 else "answer " * (n % 4)} for n in range(1, 21)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["response"]))
    (folder / "test.jsonl").write_text(json.dumps(rows[0]))
    encoder = ChatEncoder(char_tokenizer())
    wanted = settings({folder: 1.0}, dataset_splits=["train", "test"])
    found = load_ground_truth(wanted, encoder)
    assert len(list(cache.iterdir())) == 1 and load_ground_truth(wanted, encoder)["train"].hashes
    labelled = {split: [with_labels(row) for row in part.rows] for split, part in found.items()}
    lists = {
        split: [[row[name] for row in rows] for name in ("input_ids", "labels")] for split, rows in labelled.items()
    }
    assert found["train"].hashes[CONTENT] == hash_json(lists)
    half = load_ground_truth(settings({folder: 0.5}, dataset_splits=["train"]), encoder)["train"]
    everything = {row["prompt_id"] for row in found["train"].rows}
    assert len(half.rows) == len(found["train"].rows) // 2 and {row["prompt_id"] for row in half.rows} < everything
    assert isinstance(half.rows, Dataset) and half.rows.cache_files


@pytest.mark.parametrize("fraction", [1.0, 0.99])
def test_sft_rows_may_be_several_answers_to_one_prompt(tmp_path, capfd, fraction):
    rows = [{"prompt_id": "p", "prompt": "q", "response": answer} for answer in ("a", "b", "b", "c")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = settings({tmp_path / "train.jsonl": fraction}, dataset_splits=["train"])
    found = load_ground_truth(wanted, ChatEncoder(char_tokenizer()))["train"]
    assert len(found.rows) == int(4 * fraction)
    assert capfd.readouterr().err == f"{tmp_path}/train.jsonl: rows whose prompt an earlier row has too: 3\n"
