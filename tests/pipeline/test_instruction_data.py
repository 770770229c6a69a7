"""The data of the chat demo: what is shipped is what the script makes, and what its splits promise is so."""

from __future__ import annotations

import json
import re

import pytest

from spin.alignment.pipeline.demos.everyday_tasks import GENRES, tasks
from spin.alignment.pipeline.demos.instruction_data import KINDS, PROMPTS, make_rows, write_data
from spin.alignment.pipeline.demos.instruction_phrases import HELD_OUT, TRAINED, go_together
from spin.alignment.rewards import check_columns
from tests.helpers import REPOSITORY, SHARED_DATA

SHIPPED = REPOSITORY / "data" / "instructions"


@pytest.fixture(scope="module")
def splits():
    files = {name: (SHIPPED / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("train", "test")}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items()}


def kinds(rows):
    return {item["kind"] for row in rows for item in row["instructions"]}


def test_the_shipped_data_are_what_the_script_makes(tmp_path):
    write_data(tmp_path)
    assert sorted(path.name for path in SHIPPED.iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    for path in tmp_path.iterdir():
        assert (SHIPPED / path.name).read_bytes() == path.read_bytes(), path.name


def test_there_are_300_different_tasks_in_plain_sentences():
    texts = [text for _, text in tasks()]
    assert len(texts) == len(set(texts)) >= 300
    assert all(re.fullmatch(r"[A-Z].*[.?]", text) and "  " not in text for text in texts)
    topics = [topic for _, several in GENRES.values() for topic in several]
    assert len(texts) == len(topics)


def test_the_rows_and_their_instructions(splits):
    groups = {name: [row for row in splits["test"] if row["group"] == name] for name in (PROMPTS, KINDS)}
    assert len(splits["train"]) >= 600 and len(groups[PROMPTS]) >= 240 and len(groups[KINDS]) >= 60
    assert kinds(splits["train"]) == kinds(groups[PROMPTS]) == set(TRAINED)
    assert kinds(groups[KINDS]) == set(HELD_OUT) and not set(TRAINED) & set(HELD_OUT)
    for row in [*splits["train"], *splits["test"]]:
        check_columns("instructions", {"instructions": row["instructions"]})
        for item in row["instructions"]:
            for value in item["arguments"].values():
                for text in value if isinstance(value, list) else [str(value)]:
                    assert text in row["prompt"], row
        names = [item["kind"] for item in row["instructions"]]
        assert len(names) == 1 or go_together(*names)


def test_no_task_is_both_trained_and_held_out(splits):
    texts = [text for _, text in tasks()]

    def used(rows):
        return {text for row in rows for text in texts if text in row["prompt"]}

    assert not used(splits["train"]) & used(splits["test"])
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(prompts) == len(set(prompts))


def test_no_prompt_is_one_of_ifeval():
    path = SHARED_DATA / "ifeval" / "input_data.jsonl"
    if not path.is_file():
        pytest.skip(f"no IFEval prompts at {path}: set SPIN_TEST_DATA to a folder that holds ifeval/input_data.jsonl")
    plain = re.compile(r"\W+")
    known = {plain.sub(" ", json.loads(line)["prompt"].lower()).strip() for line in path.read_text().splitlines()}
    assert len(known) > 500
    for row in [row for rows in make_rows() for row in rows]:
        ours = plain.sub(" ", row["prompt"].lower()).strip()
        assert not any(ours in other or other in ours for other in known), row["prompt"]
