"""What a card says of the model that training starts from, and results that are added later."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import EvalResult, ModelCard

from spin.alignment.core.cards import SIGNATURE, portable, section, short_names, write_card
from spin.alignment.models.card import complete_card, describe_start, model_card_data


def result(value: float) -> EvalResult:
    return EvalResult("text-generation", "held-out", "9 held-out prompts", "exact_match", value)


def test_base_and_licence_are_taken_over_from_the_card_of_the_start(tmp_path):
    folder = tmp_path / "iter0" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nbase_model: org/base\nlicense: other\nlicense_name: own\n---\nText\n")
    start = describe_start(str(folder), folder)
    assert (start.name, start.bases) == ("iter0/checkpoint", ("org/base",))
    data = model_card_data("T", start, None, ["a"], ["org/data"]).to_dict()
    assert (data["base_model"], data["license"], data["license_name"]) == ("org/base", "other", "own")
    assert data["datasets"] == ["org/data"]
    assert model_card_data("T", start, "mit", [], []).to_dict()["license"] == "mit"


def test_a_hub_model_is_its_own_base_and_an_unknown_licence_is_said(tmp_path):
    start = describe_start("org/model", tmp_path)
    data = model_card_data("T", start, None, [], []).to_dict()
    assert data["base_model"] == "org/model" and data["license"] == "unknown"


def test_the_licence_in_a_gguf_file_is_that_of_the_start(tmp_path):
    (tmp_path / "import.json").write_text(json.dumps({"gguf": {"license": "apache-2.0"}}))
    assert describe_start(str(tmp_path), tmp_path).licence == {"license": "apache-2.0"}


def test_results_are_added_once_and_replaced_later(tmp_path):
    data = model_card_data("Title", describe_start(str(tmp_path), tmp_path), None, ["selfplay-spin"], [])
    body = f"{SIGNATURE}\n\n# Title\n\nA note of the owner.\n\n{section('results', 'none yet')}\n\n## Limits\n"
    write_card(tmp_path, f"---\n{data.to_yaml()}\n---\n\n{body}")
    complete_card(tmp_path, [result(0.25)], "scores: 0.25")
    once = (tmp_path / "README.md").read_bytes()
    complete_card(tmp_path, [result(0.25)], "scores: 0.25")
    assert (tmp_path / "README.md").read_bytes() == once
    complete_card(tmp_path, [result(0.5)], "scores: 0.5")
    card = ModelCard.load(tmp_path / "README.md")
    assert [item.metric_value for item in card.data.eval_results] == [0.5] and card.data.model_name == "Title"
    assert "scores: 0.5" in card.text and "0.25" not in card.text and "none yet" not in card.text
    assert "A note of the owner." in card.text and "## Limits" in card.text


@pytest.mark.parametrize(
    "text", ["# Mine\n", f"---\n: [\n---\n{SIGNATURE}\n<!-- results -->\n<!-- end of results -->\n"]
)
def test_a_card_of_someone_else_and_a_damaged_one_are_left_as_they_are(tmp_path, text, capsys):
    (tmp_path / "README.md").write_text(text)
    complete_card(tmp_path, [result(0.5)], "scores")
    assert (tmp_path / "README.md").read_text() == text
    if SIGNATURE not in text:
        write_card(tmp_path, "ours")
        assert (tmp_path / "README.md").read_text() == text and "is kept" in capsys.readouterr().err


def test_cards_name_no_folders_of_the_machine():
    names = short_names(["/data/runs/a/iter0/pairs", "/data/runs/a/iter1/pairs"])
    assert list(names.values()) == ["iter0/pairs", "iter1/pairs"]
    values = {
        "dataset_mixer": {"/data/runs/a/iter0/pairs": 1.0},
        "deepspeed": "/data/zero.json",
        "optim": "adamw_torch",
    }
    assert portable(values, names) == {
        "dataset_mixer": {"iter0/pairs": 1.0},
        "deepspeed": "zero.json",
        "optim": "adamw_torch",
    }
