"""Rejection sampling: which responses are accepted, what is written, resumed and refused."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as parquet

from spin import select_responses
from spin.alignment.core.parquet import read_rows
from spin.alignment.core.provenance import read_provenance
from spin.alignment.data.rows import GENERATED_SCHEMA, load_prompts, scorer_columns
from spin.alignment.pairs.counts import read_counts
from tests.helpers import run_main
from tests.helpers.gathering import NUM_FRACTIONS, own_prompts, record, row, write

ANSWERS = ("#### 1", "#### 1", "wrong", "so it is #### 1", "the #### 1")
FINISHED = ("stop", "stop", "stop", "length", "stop")


def write_fractions(folder, answers=ANSWERS):
    """Five responses to each prompt, the ground truth 1: two equal ones, a wrong one, a truncated one and another right one."""
    for number in range(NUM_FRACTIONS):
        rows = []
        for prompt in own_prompts(number):
            question = {"role": "user", "content": f"{prompt}?"}
            for sample, (text, finish) in enumerate(zip(answers, FINISHED, strict=True)):
                turns = [[question, {"role": "assistant", "content": said}] for said in ("#### 1", text)]
                rows.append(row(prompt, sample, chosen=turns[0], rejected=turns[1], rejected_finish_reason=finish))
        write(folder, number, rows, record(number, len(answers)))
    return folder


def select(folder, out, *flags):
    return run_main(
        select_responses.main, "--input_dir", folder, "--output_dir", out, "--scorer", "math_answer", *flags
    )


def test_right_whole_and_different_responses_are_accepted(tmp_path):
    folder, out = write_fractions(tmp_path / "in"), tmp_path / "out"
    code, said, err = select(folder, out)
    assert code == 0, err
    prompts = [f"p{prompt}" for number in range(NUM_FRACTIONS) for prompt in own_prompts(number)]
    found = {item["prompt_id"]: item["chosen"] for item in read_rows(out / "train.parquet")}
    assert list(found) == [f"{prompt}#{sample}" for prompt in prompts for sample in (0, 4)]
    assert [turn["content"] for turn in found[f"{prompts[0]}#4"]] == [f"{prompts[0][1:]}?", "the #### 1"]
    count = len(prompts)
    counts = {"prompts": count, "responses": 5 * count, "failed": 0, "rejected": count, "truncated": count}
    assert read_counts(out / "train.counts.json") == counts | {"repeated": count, "accepted": 2 * count}
    assert "accepted" in said
    # run_sft.py reads the rows as any prompts with ground truth
    assert len(load_prompts(str(out), "train")) == 2 * count


def test_a_rerun_writes_nothing_and_other_settings_are_refused(tmp_path):
    folder, out = write_fractions(tmp_path / "in"), tmp_path / "out"
    assert select(folder, out)[0] == 0
    before = (out / "train.parquet").stat().st_mtime_ns
    code, said, _ = select(folder, out)
    assert code == 0 and "already complete" in said and (out / "train.parquet").stat().st_mtime_ns == before
    code, _, err = select(folder, out, "--threshold", 0)
    assert code == 2 and "sampling.threshold: 0.0 != 1.0" in err and "--overwrite" in err
    assert select(folder, out, "--threshold", 0, "--overwrite")[0] == 0
    assert any("wrong" in item["chosen"][-1]["content"] for item in read_rows(out / "train.parquet"))
    (out / "train.counts.json").unlink()  # killed between the two files
    assert select(folder, out)[0] == 0 and (out / "train.counts.json").exists()
    (out / "train.counts.json").write_text("{")
    assert select(folder, out)[0] == 0 and read_counts(out / "train.counts.json")["accepted"] > 0


def test_the_provenance_names_the_scorer(tmp_path):
    folder, out = write_fractions(tmp_path / "in"), tmp_path / "out"
    assert select(folder, out)[0] == 0
    path = out / "train.parquet"
    made = read_provenance(parquet.read_schema(path), path)
    assert made.kind == "accepted" and made.sampling["scorer"] == "math_answer" and made.sampling["threshold"] == 1


def test_what_is_refused_leaves_nothing(tmp_path):
    folder, out = write_fractions(tmp_path / "in", answers=["wrong"] * 5), tmp_path / "out"
    code, _, err = select(folder, out)
    assert code == 2 and "no response of the split 'train' is accepted" in err and not list(out.glob("*.parquet"))
    assert select(tmp_path / "missing", out)[0] == 2
    code, _, err = run_main(
        select_responses.main, "--input_dir", folder, "--output_dir", out, "--scorer", "instructions"
    )
    assert code == 2 and "prompt" in err and "takes 'instructions', but the row has no such column" in err


def test_the_columns_of_the_row_travel_to_the_accepted_ones(tmp_path):
    schema = GENERATED_SCHEMA.append(pa.field("extra_columns", pa.string()))
    for number in range(NUM_FRACTIONS):
        rows = [
            row(prompt, 0) | {"extra_columns": json.dumps({"instructions": [{"kind": "no_commas"}]})}
            for prompt in own_prompts(number)
        ]
        write(tmp_path / "in", number, rows, record(number, 1), schema=schema)
    code, _, err = run_main(
        *(select_responses.main, "--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out"),
        *("--scorer", "instructions", "--threshold", 0),
    )
    assert code == 0, err
    rows = list(read_rows(tmp_path / "out" / "train.parquet"))
    assert scorer_columns(rows[0]) == {"instructions": [{"kind": "no_commas"}]}
