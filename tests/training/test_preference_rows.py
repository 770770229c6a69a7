"""Rows as a Python user hands them to SPINTrainer: every form gives the same pairs, and bad ones a sentence."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict

from spin.alignment.core.errors import InputError
from spin.alignment.data.preferences import load_preferences
from spin.alignment.logprobs.batch import PairDataset
from spin.alignment.training.config import SPINConfig
from spin.alignment.training.preference_rows import to_pairs
from spin.alignment.training.trainer import SPINTrainer
from tests.helpers import char_tokenizer, tiny_llama
from tests.helpers.training import metrics, train, write_config, write_pairs

TOKENIZER = char_tokenizer()
MODEL = tiny_llama(len(TOKENIZER))
QUESTION = {"role": "user", "content": "2+3?"}
RIGHT, WRONG = ({"role": "assistant", "content": text} for text in ("5", "66"))
OWN = {"prompt_id": "p", "sample_index": 0, "chosen": [QUESTION, RIGHT], "rejected": [QUESTION, WRONG]}
FORMS = {
    "TRL text": {"prompt": "2+3?", "chosen": "5", "rejected": "66"},
    "TRL conversational": {"prompt": [QUESTION], "chosen": [RIGHT], "rejected": [WRONG]},
    "TRL implicit prompt": {"chosen": [QUESTION, RIGHT], "rejected": [QUESTION, WRONG]},
    "TRL text prompt, whole conversations": {
        "prompt": "2+3?",
        "chosen": [QUESTION, RIGHT],
        "rejected": [QUESTION, WRONG],
        "score_chosen": 9.0,
    },
    "SPIN": {"real": [QUESTION, RIGHT], "generated": [QUESTION, WRONG]},
    "our own": OWN,
}


def settings(**changes) -> SPINConfig:
    values = {"use_cpu": True, "report_to": "none", "max_length": 128, "max_prompt_length": 64} | changes
    return SPINConfig(**values)


def pairs_of(*rows: dict, **changes) -> PairDataset:
    return to_pairs(Dataset.from_list(list(rows)), "train_dataset", settings(**changes), TOKENIZER, MODEL)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pair(form):
    end = TOKENIZER.eos_token_id
    (found,) = pairs_of(FORMS[form]).rows
    prompt = TOKENIZER.apply_chat_template([QUESTION], add_generation_prompt=True, return_dict=False)
    five, six = TOKENIZER("56")["input_ids"]
    ids = {name: found[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    assert ids == {"prompt_ids": prompt, "chosen_ids": [five, end], "rejected_ids": [six, six, end]}
    assert found["source"] == "train_dataset" and found["prompt_id"]


def sampled(ids: list[int]) -> dict:
    """The row OWN with sampled ids and their text as its rejected response."""
    text = TOKENIZER.decode(ids, skip_special_tokens=True)
    return {
        **OWN,
        "rejected": [*OWN["rejected"][:-1], {"role": "assistant", "content": text}],
        "rejected_token_ids": ids,
    }


def test_sampled_ids_weights_and_labels_of_our_own_columns_are_kept():
    row = sampled([9, 8, 7]) | {"rejected_finish_reason": "length"}
    weights = {"chosen_weights": [1.0, 2.0], "rejected_weights": [0.5, 0.25, 1.0]}
    labels = {"chosen_win_prob": 0.75, "rejected_win_prob": 0.25}
    (found,) = pairs_of({**row, **weights, **labels}, loss_type="sppo").rows
    assert found["rejected_ids"] == [9, 8, 7]
    assert (found["chosen_weights"], found["rejected_weights"]) == ([1.0, 2.0], [0.5, 0.25, 1.0])
    assert (found["chosen_win_prob"], found["rejected_win_prob"]) == (0.75, 0.25)
    (turned,) = pairs_of({**row, **weights}, reverse=True).rows
    assert turned["chosen_ids"] == [9, 8, 7] and turned["rejected_weights"] == [1.0, 2.0]


def test_a_column_named_source_is_no_obstacle():
    assert pairs_of({**OWN, "source": "web"}).rows.to_list() == pairs_of(OWN).rows.to_list()


def test_pairs_are_cut_and_dropped_as_the_settings_say(caplog):
    long, empty = {**FORMS["TRL text"], "chosen": "5" * 40}, {**FORMS["TRL text"], "rejected": "<|im_end|>"}
    with caplog.at_level("WARNING"):
        (found,) = pairs_of(long, empty, max_length=40, max_prompt_length=10).rows
    assert len(found["prompt_ids"]) == 10 and len(found["chosen_ids"]) == 30
    assert "train_dataset: 1 of 2 pairs dropped: the assistant turn contains the control token" in caplog.text


BAD = {
    "no rows": (Dataset.from_dict({"prompt": []}), "train_dataset has no rows"),
    "a list": ([FORMS["TRL text"]], "train_dataset is a list: pass one datasets.Dataset"),
    "all splits": (DatasetDict(train=Dataset.from_list([OWN])), "train_dataset is a DatasetDict"),
    "a stream": (Dataset.from_list([OWN]).to_iterable_dataset(), "train_dataset is a IterableDataset"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "train_dataset row 0 lacks the column 'rejected'"),
    "text without prompt": ({"chosen": "a b", "rejected": "a c"}, "train_dataset row 0 has 'chosen' as text without 'prompt'"),
    "two prompts": (
        {"chosen": [QUESTION, RIGHT], "rejected": [{**QUESTION, "content": "?"}, WRONG]},
        "train_dataset row 0: 'chosen' and 'rejected' do not share a prompt",
    ),
    "our own, two prompts": ({**OWN, "rejected": [RIGHT]}, "train_dataset row 0: 'chosen' and 'rejected' do not share"),
    "tools": ({**FORMS["TRL conversational"], "tools": "{}f"}, "train_dataset row 0: 'tools' is not JSON"),
    "images": ({**FORMS["TRL conversational"], "images": ["a"]}, "train_dataset row 0 has 'images', which a text model"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(name):
    rows, message = BAD[name]
    rows = Dataset.from_list([rows]) if isinstance(rows, dict) and not isinstance(rows, DatasetDict) else rows
    with pytest.raises(InputError, match=message):
        to_pairs(rows, "train_dataset", settings(), TOKENIZER, MODEL)


def test_a_missing_label_and_a_small_budget_are_named():
    with pytest.raises(InputError, match="loss_type sppo reads chosen_win_prob and rejected_win_prob"):
        pairs_of(OWN, loss_type="sppo")
    with pytest.raises(InputError, match="max_tokens_per_batch is 20, but pair 0 of train_dataset has"):
        pairs_of(OWN, max_tokens_per_batch=20)
    with pytest.raises(InputError, match="the data contains token id 900, but the vocabulary of the model has"):
        pairs_of(sampled([900]))
    with pytest.raises(InputError, match="the longest row has 600 tokens, but the model can attend to 512 tokens"):
        pairs_of(sampled([9] * 600), max_length=600)
    with pytest.raises(InputError, match="max_prompt_length is 512 and max_length 128"):
        settings(max_prompt_length=512)


def test_encoded_pairs_pass_as_they_are():
    pairs = pairs_of(OWN)
    assert to_pairs(pairs, "train_dataset", settings(), None, None) is pairs
    assert to_pairs(None, "eval_dataset", settings(), None, None) is None


@pytest.mark.slow
def test_the_trainer_gives_the_losses_of_the_program(tiny_model, tmp_path):
    """A model by name, or as a module that has dropout: what run_spin.py trains, SPINTrainer trains."""
    folder = write_pairs(tmp_path / "pairs")
    changes = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 24,
        "num_train_epochs": 3,
        "logging_steps": 1,
        "warmup_steps": 0,
    }
    train(write_config(tmp_path / "config.yaml", tiny_model, folder, **changes))
    theirs = [entry["loss"] for entry in metrics(tmp_path / "out")["history"] if "loss" in entry]
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(tiny_model, attention_dropout=0.5)
    for name, model in (("name", str(tiny_model)), ("module", module)):
        out = tmp_path / name
        trainer = SPINTrainer(
            model=model,
            args=settings(output_dir=str(out), save_strategy="no", disable_tqdm=True, **changes),
            train_dataset=load_preferences(folder, "train"),
            eval_dataset=Dataset.from_list([{"prompt": "say word 0", "chosen": "red", "rejected": "green"}]),
        )
        with pytest.raises(InputError, match=r"call train\(\) before evaluate\(\)"):
            trainer.evaluate()
        trainer.train()
        ours = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert ours == pytest.approx(theirs, abs=1e-6) and len(ours) == 3
        assert trainer.evaluate()["eval_rewards/margins"] > 0.005
        assert json.loads((out / "first_loss.json").read_text()) == pytest.approx(0.693147, abs=1e-6)
        # The same weights have the same hash, given by name or not: the stores have the same names.
        assert {path.name for path in (out / "reference").iterdir()} == {
            path.name for path in (tmp_path / "name" / "reference").iterdir()
        }


def test_other_weights_have_another_hash(tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    from spin.alignment.models.weights_hash import hash_module

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    hashes = [hash_module(model), hash_module(model.half()), hash_module(model.bfloat16())]
    with torch.no_grad():
        model.lm_head.weight[3, 2] += 1.0
    hashes.append(hash_module(model))
    assert len(set(hashes)) == 4
    partitioned = torch.nn.Linear(2, 2)
    empty = hash_module(partitioned)
    partitioned.weight.ds_tensor = torch.ones(2)  # what DeepSpeed ZeRO-3 leaves of a weight in a process
    assert hash_module(partitioned) != empty
