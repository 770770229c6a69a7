"""Rows and tokens read = those trained on + those truncated or dropped, however they are batched."""

from __future__ import annotations

import json

import pytest

from spin import run_sft, run_spin
from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
from spin.alignment.training.accounting import Account
from tests.helpers import run_main
from tests.helpers.training import TWO_PROCESSES, launcher, metrics, train, write_config


def write_mixed(folder, tiny_model) -> dict[str, int]:
    """Ten pairs: three too long for 48 tokens, one dropped for an empty response; return the numbers expected."""
    encoder = ChatEncoder(load_tokenizer(str(tiny_model)))
    rows, read, kept, truncated = [], 0, 0, [0, 0]
    for number in range(10):
        prompt = [{"role": "user", "content": "x" * (60 if number < 2 else 5)}]
        sides = ["y" * (50 if number == 2 else 4), "z" * 6]
        if number == 9:
            sides[1] = ""
        row = {"prompt_id": f"p{number}", "rejected_token_ids": None}
        for side, text in zip(("chosen", "rejected"), sides, strict=True):
            row[side] = [*prompt, {"role": "assistant", "content": text}]
        ids = encoder.prompt_ids(prompt)
        lengths = [
            len(encoder.response_ids(row[side], ids)) if row[side][-1]["content"] else 1
            for side in ("chosen", "rejected")
        ]
        row["rejected_token_ids"] = [] if number == 9 else encoder.response_ids(row["rejected"], ids)
        rows.append(row)
        if number == 9:
            read += len(ids) + lengths[0]
            dropped = len(ids) + lengths[0]
            continue
        read += len(ids) + sum(lengths)
        if len(ids) + max(lengths) > 48:
            cut = max(0, len(ids) - 32)
            free = 48 - (len(ids) - cut)
            truncated[0] += cut
            truncated[1] += sum(length - min(length, free) for length in lengths)
    kept = read - dropped - sum(truncated)
    folder.mkdir()
    (folder / "train_prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"read": read, "dropped": dropped, "prompts": truncated[0], "responses": truncated[1], "kept": kept}


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_everything_read_is_trained_truncated_or_dropped(tiny_model, tmp_path, batching):
    wanted = write_mixed(tmp_path / "data", tiny_model)
    settings = {"max_length": 48, "max_prompt_length": 32, "num_train_epochs": 2, "batching": batching}
    code, _, err = run_main(run_spin.main, write_config(tmp_path / "c.yaml", tiny_model, tmp_path / "data", **settings))
    assert code == 0, err
    found = metrics(tmp_path / "out")["accounting"]
    assert found["train"]["rows"] == {"read": 10, "dropped": {"empty rejected response": 1}, "kept": 9}
    tokens = found["train"]["tokens"]
    assert tokens["read"] == wanted["read"] and tokens["kept"] == wanted["kept"]
    assert tokens["truncated"] == {"prompts": wanted["prompts"], "responses": wanted["responses"]}
    assert tokens["dropped"] == {"empty rejected response": wanted["dropped"]}
    assert tokens["read"] == tokens["kept"] + sum(tokens["truncated"].values()) + sum(tokens["dropped"].values())
    assert found["trained"] == {"steps": 6, "rows": 2 * 9, "tokens": 2 * tokens["kept"]}


@pytest.mark.slow
def test_two_processes_train_on_the_same_rows_and_tokens(tiny_model, pairs, tmp_path):
    config = write_config(tmp_path / "c.yaml", tiny_model, pairs, per_device_train_batch_size=2)
    train(config, launch=launcher(*TWO_PROCESSES["DDP"]))
    found = metrics(tmp_path / "out")["accounting"]
    assert found["trained"] == {"steps": 6, "rows": 24, "tokens": found["train"]["tokens"]["kept"]}


def test_sft_counts_the_ground_truth_alone(tiny_model, tmp_path):
    encoder = ChatEncoder(load_tokenizer(str(tiny_model)))
    rows, read, kept = [], 0, 0
    for number in range(8):
        turns = [
            {"role": "user", "content": "q" * (60 if number == 0 else 4)},
            {"role": "assistant", "content": "answer"},
        ]
        rows.append({"prompt_id": f"p{number}", "messages": turns})
        prompt = encoder.prompt_ids(turns[:1])
        length = len(encoder.response_ids(turns, prompt))
        read += len(prompt) + length
        kept += len(prompt) + length if len(prompt) + length <= 48 else 32 + min(length, 16)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"dataset_splits": ["train"], "max_length": 48, "max_prompt_length": 32}
    code, _, err = run_main(run_sft.main, write_config(tmp_path / "c.yaml", tiny_model, tmp_path / "data", **settings))
    assert code == 0, err
    found = metrics(tmp_path / "out")["accounting"]
    assert (found["train"]["tokens"]["read"], found["train"]["tokens"]["kept"]) == (read, kept) and kept < read
    assert found["trained"] == {"steps": 2, "rows": 8, "tokens": kept}


def test_a_row_or_token_that_is_lost_is_an_internal_error():
    account = Account()
    account.keep(10, (2, 3))
    account.drop("empty", 4)
    assert (account.rows, account.tokens) == (2, 19)
    account.check(1, 10)
    for rows, tokens in ((0, 10), (1, 9)):
        with pytest.raises(RuntimeError, match="2 rows and 19 tokens were read"):
            account.check(rows, tokens)
    assert (account + account).record()["tokens"]["dropped"] == {"empty": 8}
