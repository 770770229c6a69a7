"""TIS-DPO's files: the log-prob differences of their tokens become weights of the tokens that are trained on."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from spin import estimate_weights
from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.data.preferences import load_preferences
from spin.alignment.methods.losses import find_loss
from spin.alignment.token_weights.stored_gains import gains_of_pair
from spin.alignment.training.encode_rows import weighted_responses
from tests.helpers import CHATML, char_tokenizer, run_main

# As token_weight_estimation.py writes it: one number for each token of the bare text (here: each character), no end of turn.
ROW = {
    "prompt": "\n\nHuman: Hi\n\nAssistant:",
    "chosen": " yes",
    "rejected": "no",
    "chosen_weight": [0.0, -0.5, 0.25, -1.0],
    "rejected_weight": [0.75, -0.5],
}
STRIPPING = CHATML.replace("m['content'] }}", "m['content'] | trim }}")


def write(folder, *rows, name="train.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def weigh(folder, out, model, *flags):
    words = ("--input_dir", folder, "--output_dir", out, "--weighting", "stored_gains", "--tokenizer", model, *flags)
    return run_main(estimate_weights.main, *words)


def test_the_weights_are_those_of_tis_dpo(tmp_path, tiny_model):
    folder = write(tmp_path / "pairs", ROW, {**ROW, "prompt": "\n\nHuman: Hello\n\nAssistant:"})
    code, out, err = weigh(folder, tmp_path / "out", tiny_model, "--transform", "origin")
    assert code == 0 and "train: 2 rows weighted by stored_gains" in out, err
    (file,) = (tmp_path / "out").glob("*.parquet")
    assert file.name == "train_prefs-00000-of-00001.parquet" and "chosen_gains" not in pq.read_schema(file).names
    pair = load_preferences(tmp_path / "out", "train")[0]
    assert pair["chosen"][0] == {"role": "user", "content": "Hi"}
    # Its training negates the chosen side's numbers and takes the rejected side's as they are; the end of turn has 0.
    assert pair["chosen_weights"] == [0.0, 0.5, -0.25, 1.0, 0.0] and pair["rejected_weights"] == [0.75, -0.5, 0.0]
    assert len(pair["chosen_token_ids"]) == 5 and pair["chosen_finish_reason"] == "stop"
    assert weighted_responses(load_preferences(tmp_path / "out", "train").column_names, find_loss("sigmoid")) == [
        "chosen",
        "rejected",
    ]
    assert "already complete" in weigh(folder, tmp_path / "out", tiny_model, "--transform", "origin")[1]


def test_a_template_that_strips_the_response_keeps_the_gains_with_their_characters():
    encoder = ChatEncoder(char_tokenizer(template=STRIPPING))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " yes "}]
    row = {"chosen": turns, "rejected": turns, "chosen_gains": [9.0, 1.0, 2.0, 3.0, 9.0], "rejected_gains": [0.0] * 5}
    ids = encoder.tokenizer("yes")["input_ids"] + [encoder.end_id]
    encoded = {"chosen_ids": ids, "rejected_ids": ids}
    assert gains_of_pair(row, encoded, encoder, "a row") == ([1.0, 2.0, 3.0, 0.0], [0.0] * 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chosen_weight": [1.0]}, "'chosen_weight' has 1 numbers, but the chosen response has 4 tokens"),
        ({"rejected_weight": None}, "has 'chosen_weight' but no list 'rejected_weight'"),
        ({"chosen_weight": [1.0, "a", 0, 0]}, "'chosen_weight' contains 'a', not a finite number"),
        ({"chosen_weight": None, "rejected_weight": None}, "has no gains of tokens"),
    ],
)
def test_gains_that_do_not_fit_are_refused(tmp_path, tiny_model, change, says):
    code, _, err = weigh(write(tmp_path / "pairs", {**ROW, **change}), tmp_path / "out", tiny_model)
    assert code == 2 and says in err and not list((tmp_path / "out").glob("*prefs*.json"))


def test_training_without_the_weights_is_refused(tmp_path):
    rows = load_preferences(write(tmp_path / "pairs", ROW), "train")
    with pytest.raises(InputError, match=r"gains of tokens .* but no weights: .* --weighting stored_gains"):
        weighted_responses(rows.column_names, find_loss("sigmoid"))
