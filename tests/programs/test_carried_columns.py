"""Tools, thoughts and the columns of the source, from a foreign file through every program to the pairs and the scorers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest

from spin import convert_data, reformat
from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
from spin.alignment.data.config import DataConfig
from spin.alignment.data.preferences import load_preferences
from spin.alignment.data.rows import GENERATED_SCHEMA, PROMPT_SCHEMA, load_prompts
from spin.alignment.evaluation.held_out import encode_held_out
from spin.alignment.evaluation.responses import scored_rows
from spin.alignment.generation import BACKENDS
from spin.alignment.generation.base import Response
from spin.alignment.rewards import find_scorer
from spin.alignment.rewards.rules import RuleScorer
from spin.alignment.training.online.labels import PairMaker, StepCounts, scorer_of
from spin.alignment.training.online.prompts import load_splits
from spin.generate import main as generate_main
from tests.helpers import char_tokenizer, run_main, save_tiny_model
from tests.helpers.generate_with_fake import FakeBackend

TOOLS = [{"type": "function", "function": {"name": "weather"}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
RULE = """
def allowed(prompt, response, reference, limit, *, scale=1.0, source="none"):
    assert source in ("web", None), source
    return scale * -abs(len(response) - limit)
"""


# ChatML with tools, tool calls and thoughts.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}{{ call.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("columns") / "model")
    char_tokenizer(template=TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture
def rule(tmp_path, monkeypatch) -> str:
    (tmp_path / "row_rules.py").write_text(RULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "row_rules:allowed"
    sys.modules.pop("row_rules", None)


def records() -> list[dict]:
    rows = []
    for number in range(6):
        turns = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": str(number)}]
        rows.append({"id": f"r{number}", "messages": turns, "limit": number, "source": "web" if number else None})
    called = [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "5", "name": "weather"},
    ]
    rows[0]["messages"][1:1] = called
    rows[0]["tools"] = TOOLS
    rows[1]["messages"][-1]["reasoning"] = "hm"
    rows[2]["system"] = "Be brief."
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(main, **flags: object) -> str:
    code, printed, errors = run_main(
        main, *(text for name, value in flags.items() for text in (f"--{name}", value)[: 2 - (value is True)])
    )
    assert code == 0, errors
    return printed + errors


@pytest.fixture
def prompts(tmp_path) -> Path:
    said = run(reformat.main, data=write(tmp_path / "a.jsonl", records()), output_dir=tmp_path / "prompts")
    assert "a.jsonl: columns passed to scorers only: limit, source" in said
    return tmp_path / "prompts"


def test_everything_of_a_row_reaches_the_pairs_and_the_rule(prompts, tmp_path, model, rule):
    rows = pq.read_table(prompts / "train.parquet")
    assert rows.schema.names == ["prompt_id", "chosen", "tools", "extra_columns"]
    turn = rows.schema.field("chosen").type.value_type
    assert [turn.field(place).name for place in range(turn.num_fields)] == [
        "role", "content", "reasoning_content", "tool_calls", "name",
    ]  # fmt: skip
    flags = {"model": model, "backend": "fake", "input_dir": prompts, "max_new_tokens": 8, "num_samples": 3}
    with patch.dict(BACKENDS, fake=FakeBackend):
        run(generate_main, output_dir=tmp_path / "generated", frac_len=4, data_frac="auto", **flags)
    made = [
        row for path in sorted((tmp_path / "generated").glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    assert len(made) == 18
    convert = {"input_dir": tmp_path / "generated", "pairing": "best_vs_worst", "scorer": f"{rule}:scale=2"}
    run(convert_data.main, output_dir=tmp_path / "pairs", **convert)
    pairs = {pair["prompt_id"]: pair for pair in load_preferences(tmp_path / "pairs", "train")}
    for number, row in enumerate(records()):
        texts = [found["rejected"][-1]["content"] for found in made if found["prompt_id"] == f"r{number}"]
        scores = sorted(-2 * abs(len(text) - number) for text in texts)
        if scores[0] == scores[-1]:
            assert f"r{number}" not in pairs
            continue
        pair = pairs[f"r{number}"]
        assert (pair["rejected_score"], pair["chosen_score"]) == (scores[0], scores[-1])
        assert pair["tools"] == (json.dumps(TOOLS) if number == 0 else None)
        assert json.loads(pair["extra_columns"]) == {"limit": number, "source": row["source"]}
    first = next(row for row in made if row["prompt_id"] == "r0")
    assert [turn["role"] for turn in first["rejected"]] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(first["rejected"][1]["tool_calls"]) == [CALL] and first["rejected"][2]["name"] == "weather"
    assert next(row for row in made if row["prompt_id"] == "r1")["chosen"][-1]["reasoning_content"] == "hm"
    assert next(row for row in made if row["prompt_id"] == "r2")["rejected"][0] == {
        "role": "system", "content": "Be brief.", "reasoning_content": None, "tool_calls": None, "name": None,
    }  # fmt: skip


def test_data_without_anything_new_keeps_its_columns(tmp_path, model):
    rows = [{"question": f"{number}?", "answer": str(number)} for number in range(3)]
    run(reformat.main, data=write(tmp_path / "a.jsonl", rows), output_dir=tmp_path / "prompts")
    assert pq.read_schema(tmp_path / "prompts" / "train.parquet").remove_metadata() == PROMPT_SCHEMA
    flags = {"model": model, "backend": "fake", "input_dir": tmp_path / "prompts", "max_new_tokens": 8}
    with patch.dict(BACKENDS, fake=FakeBackend):
        run(generate_main, output_dir=tmp_path / "generated", **flags)
    assert pq.read_schema(tmp_path / "generated" / "train-00000.parquet").remove_metadata() == GENERATED_SCHEMA
    run(convert_data.main, input_dir=tmp_path / "generated", output_dir=tmp_path / "pairs")
    assert load_preferences(tmp_path / "pairs", "train").column_names == GENERATED_SCHEMA.names


def test_online_training_passes_the_columns_to_the_rule(prompts, model, rule):
    encoder = ChatEncoder(load_tokenizer(model))
    config = SimpleNamespace(
        baseline="prompt", pairing="best_vs_worst", eval_prompts=None, seed=0, max_new_tokens=8, loss_type="sigmoid"
    )
    data = DataConfig(
        dataset_mixer={str(prompts): 1.0}, dataset_splits=["train"], max_length=300, max_prompt_length=256
    )
    found = load_splits(data, config, encoder)[0]["train"].prompts
    settings = SimpleNamespace(name=rule)
    config.scorer_settings = None
    assert scorer_of(config) is None
    from spin.alignment.rewards import ScorerSettings, make_scorer

    maker = PairMaker(SimpleNamespace(**vars(config), needs=()), encoder, make_scorer(ScorerSettings(settings.name)))
    responses = [[Response([encoder.end_id], "stop", None)] for _ in found]
    labelled = maker.label(found, responses, StepCounts())
    assert {rows[0]["prompt_id"]: rows[0]["rejected_score"] for rows in labelled} == {f"r{n}": -n for n in range(6)}
    assert labelled[0][0]["tools"] == json.dumps(TOOLS)


def test_evaluation_passes_the_columns_to_the_metric(prompts, model, rule):
    encoder = ChatEncoder(load_tokenizer(model))
    held_out, _ = encode_held_out(load_prompts(str(prompts), "train").to_list(), encoder, 400, 8)
    assert [item.prompt for item in held_out] == [f"{number}?" for number in range(6)]
    responses = [Response([encoder.end_id], "stop", None)] * 6

    def scores(name: str, text: str) -> list[float]:
        scorer = RuleScorer(name, find_scorer(name))
        return [row["score"] for row in scored_rows("m", 0.0, held_out, responses, [text] * 6, scorer, [])]

    assert scores(rule, "12") == [-abs(2 - number) for number in range(6)]
    assert sorted(scores("exact_match", "1")) == [0, 0, 0, 0, 0, 1]


def test_prompts_without_an_answer_pass_on_request_only(tmp_path):
    rows = [
        {"prompt": "1?", "limit": 3},
        {"prompt": "2?", "response": None},
        {"messages": [{"role": "user", "content": "3?"}]},
    ]
    rows.append({"prompt": "4?", "response": "4"})
    data = write(tmp_path / "a.jsonl", rows)
    code, _, errors = run_main(reformat.main, "--data", data, "--output_dir", tmp_path / "out")
    assert code == 2 and "a.jsonl row 0 has the columns prompt, limit" in errors
    said = run(reformat.main, data=data, output_dir=tmp_path / "out", allow_prompts=True)
    assert "wrote 4 training" in said
    found = load_prompts(str(tmp_path / "out"), "train", ground_truth_required=False).to_list()
    assert [len(row["chosen"]) for row in found] == [1, 1, 1, 2]
    assert json.loads(found[0]["extra_columns"]) == {"limit": 3}
    assert run(reformat.main, data=data, output_dir=tmp_path / "out", allow_prompts=True).startswith(
        f"{tmp_path / 'out'} is already"
    )


def test_a_refused_column_can_be_left_out_and_bad_responses_are_counted(tmp_path):
    rows = [
        {"prompt": "1?", "completion": "good", "label": True, "images": []},
        {"prompt": "2?", "completion": "harmful", "label": False, "images": None},
        {"prompt": "3?", "completion": "a cat", "label": True, "images": ["a.png"]},
    ]
    data = write(tmp_path / "a.jsonl", rows)
    code, _, errors = run_main(reformat.main, "--data", data, "--output_dir", tmp_path / "out")
    assert code == 2 and errors.count("\n") == 1
    assert "a.jsonl row 2 has 'images', which a text model cannot see" in errors and "--ignore_columns images" in errors
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    said = run(reformat.main, data=data, output_dir=tmp_path / "out", ignore_columns="images")
    assert "wrote 2 training" in said and "skipped, because a response with label false is no ground truth: 1" in said
    flags = ("--data", data, "--output_dir", tmp_path / "no", "--ignore_columns", "images", "weights")
    code, _, errors = run_main(reformat.main, *flags)
    assert (code, errors) == (2, f"error: {data} has no column weights: correct ignore_columns\n")
    said = run(reformat.main, data=data, output_dir=tmp_path / "two", skip_invalid=True)
    assert "1 invalid rows skipped" in said and "wrote 1 training" in said
