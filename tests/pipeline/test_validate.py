"""`spin validate` names every planted fault, and finds none where there is none."""

from __future__ import annotations

import json

import pytest

from spin import cli
from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import ParquetSink
from spin.alignment.core.provenance import Provenance
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.data.rows import GENERATED_SCHEMA, PROMPT_SCHEMA
from spin.alignment.pipeline.validate import validate
from tests.helpers import char_tokenizer, run_main, save_tiny_model

GENERATED = Provenance("generated", split="train")
ENCODER = ChatEncoder(char_tokenizer())
PROMPT = [{"role": "user", "content": "3+1"}]


def said(text: str) -> list[dict[str, str]]:
    return [*PROMPT, {"role": "assistant", "content": text}]


def good_row(prompt_id: str = "p0", **changes: object) -> dict[str, object]:
    row = {
        "prompt_id": prompt_id,
        "sample_index": 0,
        "chosen": said("4"),
        "rejected": said("5"),
        "rejected_token_ids": ENCODER.response_ids(said("5")),
        "rejected_finish_reason": "stop",
    }
    return {**row, **changes}


def write(path, *rows, provenance=GENERATED, schema=GENERATED_SCHEMA):
    with ParquetSink(path, schema, provenance) as sink:
        sink.write(list(rows))
    return path


def problems(path) -> str:
    return "\n".join(validate(path, ENCODER)[1])


def test_good_rows_have_no_problem(tmp_path):
    write(tmp_path / "train-00000.parquet", good_row(), good_row("p1"))
    assert validate(tmp_path, ENCODER) == (2, [])
    assert run_main(cli.main, "validate", tmp_path)[0] == 0


IDS = ENCODER.response_ids(said("5"))
FAULTS = {
    "text": ({"rejected": said("6")}, "do not decode to the text"),
    "two ends": ({"rejected_token_ids": [*IDS, ENCODER.end_id]}, "2 end tokens"),
    "no end": ({"rejected_token_ids": IDS[:-1]}, "0 end tokens"),
    "cut with end": ({"rejected_finish_reason": "length"}, "ids contain an end token"),
    "no ids": ({"rejected_token_ids": []}, "rejected_token_ids is empty"),
    "reason": ({"rejected_finish_reason": "eos"}, "it must be stop or length"),
    "vocabulary": ({"rejected_token_ids": [99999, *IDS]}, "outside of the tokenizer"),
    "prompts": ({"rejected": [{"role": "user", "content": "other"}, said("5")[-1]]}, "do not share a prompt"),
    "roles": ({"chosen": [*PROMPT, *PROMPT]}, "row 1"),
    "twice": ({"prompt_id": "p0"}, "prompt p0 with sample 0 appears more than once"),
    "no id": ({"prompt_id": ""}, "prompt_id is empty"),
}


@pytest.mark.parametrize(("changes", "sentence"), FAULTS.values(), ids=FAULTS.keys())
def test_planted_fault_is_named_with_its_row(tmp_path, changes, sentence):
    path = write(tmp_path / "train-00000.parquet", good_row(), good_row(**{"prompt_id": "p1", **changes}))
    assert sentence in problems(path) and "row 1" in problems(path)
    assert "row 0" not in problems(path)


def test_mixed_provenance_and_gaps_are_named(tmp_path):
    write(tmp_path / "train_prefs-00000-of-00003.parquet", good_row())
    other = Provenance("generated", split="train", weights_hash="other")
    write(tmp_path / "train_prefs-00002-of-00003.parquet", good_row("p1"), provenance=other)
    found = problems(tmp_path)
    assert "come from different runs: weights_hash" in found and "the files 1 of 3 are missing" in found


def test_torn_file_and_missing_provenance_are_named(tmp_path):
    import pyarrow.parquet as pq

    pq.write_table(
        pq.read_table(write(tmp_path / "a.parquet", good_row())).replace_schema_metadata(None), tmp_path / "a.parquet"
    )
    whole = write(tmp_path / "b.parquet", good_row()).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    found = problems(tmp_path)
    assert "a.parquet has no provenance" in found and "b.parquet is not a readable parquet" in found


def test_prompt_rows(tmp_path):
    rows = [{"prompt_id": name, "chosen": said("4")} for name in ("p0", "p0")]
    path = write(tmp_path / "train.parquet", *rows, provenance=Provenance("prompts"), schema=PROMPT_SCHEMA)
    assert "appears more than once" in problems(path)


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_of_other_tools_are_checked_row_by_row(tmp_path):
    answered = {"instruction": "add 1", "input": "", "output": "2"}
    write_lines(tmp_path / "train.jsonl", answered, {"prompt": "3+1"}, {**answered, "output": 5}, answered)
    write_lines(tmp_path / "test.jsonl", {"prompt": "4+1"})
    checked, found = validate(tmp_path, ENCODER)
    assert checked == 5 and len(found) == 2
    assert "train.jsonl row 2" in found[0] and "train.jsonl row 3 and " in found[1] and "the same prompt id" in found[1]


def test_pairs_of_other_tools_are_checked(tmp_path):
    pair = {"prompt": "3+1", "chosen": "4", "rejected": "5"}
    write_lines(tmp_path / "train.jsonl", pair, {**pair, "prompt": "3+2"})
    assert validate(tmp_path, ENCODER) == (2, [])
    write_lines(tmp_path / "train.jsonl", pair, {**pair, "rejected": None})
    checked, found = validate(tmp_path / "train.jsonl", None)
    assert checked == 2 and len(found) == 1 and "row 1" in found[0]


def test_files_of_other_tools_beside_own_ones_are_checked(tmp_path):
    write(tmp_path / "train-00000.parquet", good_row())
    write_lines(tmp_path / "test.jsonl", {"prompt": ""})
    checked, found = validate(tmp_path, ENCODER)
    assert checked == 2 and len(found) == 1 and "test.jsonl row 0" in found[0]


def test_what_is_no_data_is_refused_by_name(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    with pytest.raises(InputError, match=r"c\.yaml has an unknown file type"):
        validate(tmp_path / "c.yaml", None)
    with pytest.raises(InputError, match="contains no data file, model or run"):
        validate(tmp_path, None)
    (tmp_path / "train.jsonl").write_text("")
    assert "contains no rows" in problems(tmp_path)


def test_model_folder(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    assert validate(folder, None) == (1, [])
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    (folder / "chat_template.jinja").unlink()
    found = "\n".join(validate(folder, None)[1])
    assert "model.safetensors is damaged" in found and "no chat template" in found
    assert run_main(cli.main, "validate", folder)[0] == 2
