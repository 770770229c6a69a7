"""How token weights and labels travel from the columns of the data to the loss, and what is refused on the way."""

from __future__ import annotations

import json

import pytest
import yaml
from datasets import Dataset

from spin import run_spin
from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.data.config import DataConfig
from spin.alignment.data.preferences import load_preferences
from tests.helpers import char_tokenizer, run_main
from tests.helpers.training import data_key, encode_split, metrics, write_config, write_pairs

CONFIG = {"dataset_mixer": {"x": 1.0}, "max_length": 64, "max_prompt_length": 32}


def preference(number=0, chosen="ab", rejected="cde", **extra):
    prompt = [{"role": "user", "content": f"q{number}"}]
    return {
        "prompt_id": f"p{number}",
        "sample_index": 0,
        "source": "some/data",
        "chosen": [*prompt, {"role": "assistant", "content": chosen}],
        "rejected": [*prompt, {"role": "assistant", "content": rejected}],
        **extra,
    }


def encode(rows, loss_type="sigmoid", reverse=False, **config):
    encoder = ChatEncoder(char_tokenizer())
    return encode_split(Dataset.from_list(rows), encoder, DataConfig(**{**CONFIG, **config}), loss_type, reverse)


REWARDS = {"chosen_reward": 1.25, "rejected_reward": -3.5}
LABELS = {
    "chosen_win_prob": 0.7,
    "rejected_win_prob": 0.2,
    "chosen_pair_win_prob": 0.9,
    "rejected_pair_win_prob": 0.1,
}


@pytest.mark.parametrize(
    ("loss_type", "feature", "values"),
    [
        ("sppo", "win_prob", (0.7, 0.2)),
        ("sppo_single", "pair_win_prob", (0.9, 0.1)),
        ("sppo_reward", "reward", (1.25, -3.5)),
    ],
)
def test_each_loss_gets_its_label(loss_type, feature, values):
    encoded, _ = encode([preference(**(REWARDS if feature == "reward" else LABELS))], loss_type)
    assert set(encoded.column_names) == {
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        f"chosen_{feature}",
        f"rejected_{feature}",
    }
    assert (encoded[0][f"chosen_{feature}"], encoded[0][f"rejected_{feature}"]) == values


@pytest.mark.parametrize("loss_type", ["sigmoid", "sppo_hard", "space"])
def test_other_losses_carry_no_label(loss_type):
    encoded, _ = encode([preference(**LABELS)], loss_type)
    assert set(encoded.column_names) == {"prompt_ids", "chosen_ids", "rejected_ids"}


def test_reversed_pairs_change_places_with_all_they_have():
    weights = {"chosen_weights": [0.1, 0.2, 0.3], "rejected_weights": [1.0, 2.0, 3.0, 4.0]}
    (plain, _), (reverse, _) = (encode([preference(**LABELS, **weights)], "sppo", turned) for turned in (False, True))
    for name in ("ids", "weights", "win_prob"):
        assert plain[0][f"chosen_{name}"] == reverse[0][f"rejected_{name}"] != plain[0][f"rejected_{name}"]
        assert plain[0][f"rejected_{name}"] == reverse[0][f"chosen_{name}"]
    assert plain[0]["prompt_ids"] == reverse[0]["prompt_ids"]
    assert data_key({"train": plain}) != data_key({"train": reverse})


def test_a_dropped_row_takes_its_labels_with_it():
    weights = {"chosen_weights": [1.0] * 3, "rejected_weights": [1.0] * 4}
    eos = char_tokenizer().eos_token
    encoded, dropped = encode(
        [preference(0, chosen=f"a{eos}b", **LABELS, **weights), preference(1, **LABELS, **weights)], "sppo"
    )
    assert len(encoded) == 1 and sum(dropped.values()) == 1
    assert encoded[0]["chosen_weights"] == [1.0] * 3 and encoded[0]["chosen_win_prob"] == 0.7


def test_the_key_of_the_data_knows_labels_and_weights():
    keys = set()
    for chosen, weight in ((0.7, 1.0), (0.8, 1.0), (0.7, 2.0)):
        weights = {"chosen_weights": [weight] * 3, "rejected_weights": [1.0] * 4}
        encoded, _ = encode([preference(**{**LABELS, **weights, "chosen_win_prob": chosen})], "sppo")
        keys.add(data_key({"train": encoded}))
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("loss_type", "columns", "pairing"),
    [
        ("sppo", "chosen_win_prob and rejected_win_prob", "win_rate"),
        ("sppo_single", "chosen_pair_win_prob and rejected_pair_win_prob", "win_rate"),
        ("sppo_reward", "chosen_reward and rejected_reward", "every_sample"),
    ],
)
def test_missing_columns_are_named_with_the_pairing_that_writes_them(loss_type, columns, pairing):
    sentence = (
        f"loss_type {loss_type} reads {columns}, which the pairs in some/data do not have: .* --pairing {pairing},"
    )
    with pytest.raises(InputError, match=sentence):
        encode([preference()], loss_type)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sppo_hard"])
def test_pairs_that_prefer_nothing_are_kept_from_losses_that_compare(loss_type):
    sentence = (
        f"some/data have rewards but no preference .* {loss_type} compares two responses: set loss_type: sppo_reward"
    )
    with pytest.raises(InputError, match=sentence):
        encode([preference(**REWARDS)], loss_type)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "chosen_win_prob is None, not a probability"),
        (1.2, r"chosen_win_prob is 1\.2, not a probability"),
        (float("nan"), "chosen_win_prob is nan, not a probability"),
    ],
)
def test_a_label_that_is_no_probability_is_named(value, sentence):
    rows = [preference(0, **LABELS), preference(1, **{**LABELS, "chosen_win_prob": value})]
    with pytest.raises(InputError, match=rf"some/data row 1 \(prompt p1\): {sentence}"):
        encode(rows, "sppo")


@pytest.mark.parametrize(("weights", "found"), [(None, "none"), ([1.0, 1.0], "2"), ([1.0] * 4, "4")])
def test_weights_that_do_not_fit_are_named(weights, found):
    fits = {"chosen_weights": [1.0] * 3, "rejected_weights": [1.0] * 4}
    rows = [preference(0, **fits), preference(1, **fits | {"chosen_weights": weights})]
    with pytest.raises(
        InputError, match=rf"row 1 \(prompt p1\): chosen_weights must have one weight per token \(3\), .* {found}"
    ):
        encode(rows)


def test_labels_are_read_from_foreign_files_too(tmp_path):
    row = {name: value for name, value in preference(**LABELS).items() if name != "source"}
    (tmp_path / "train_prefs.jsonl").write_text(json.dumps(row) + "\n")
    loaded = load_preferences(str(tmp_path), "train_prefs")
    assert {name: loaded[0][name] for name in LABELS} == LABELS


def test_the_program_refuses_a_loss_without_its_labels(tiny_model, tmp_path):
    config = write_config(tmp_path / "c.yaml", tiny_model, write_pairs(tmp_path / "pairs", 4), loss_type="sppo")
    code, _, error = run_main(run_spin.main, config)
    assert code == 2 and "with --pairing win_rate" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_the_program_trains_on_win_rates(tiny_model, tmp_path, batching):
    """From zero log-ratios with eta = 10: 1/2 [(10 * 0.2)^2 + (10 * -0.3)^2] = 6.5 at the first step."""
    folder = write_pairs(tmp_path / "pairs", 8)
    file = folder / "train_prefs.jsonl"
    rows = [json.loads(line) | LABELS for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"loss_type": "sppo", "beta": 0.1, "batching": batching, "reverse": False, "num_train_epochs": 6}
    assert run_main(run_spin.main, write_config(tmp_path / "c.yaml", tiny_model, folder, **settings))[0] == 0
    record = metrics(tmp_path / "out")
    assert record["first_loss"] == pytest.approx(6.5, abs=1e-5)
    assert [entry["loss"] for entry in record["history"] if "loss" in entry][-1] < 6.5
    assert yaml.safe_load((tmp_path / "out" / "inputs.json").read_text())["reverse"] is False
