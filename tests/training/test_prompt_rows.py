"""Prompts as a Python user hands them to OnlineTrainer."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.training.online.config import OnlineConfig
from spin.alignment.training.online.prompts import to_prompts
from spin.alignment.training.online.trainer import OnlineTrainer
from tests.helpers import char_tokenizer, run_script
from tests.helpers.online import online_values, write_online, write_prompts
from tests.helpers.training import metrics

QUESTION, ANSWER = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}
SCORER = "tests.helpers.online:share_of_letters"


def settings(**changes) -> OnlineConfig:
    values = {"use_cpu": True, "report_to": "none", "max_length": 96, "max_prompt_length": 64, "max_new_tokens": 8}
    return OnlineConfig(**values | {"scorer": SCORER} | changes)


def prompts_of(*rows: dict, name: str = "train_dataset", **changes):
    return to_prompts(Dataset.from_list(list(rows)), settings(**changes), ChatEncoder(char_tokenizer()), name)


@pytest.mark.parametrize(
    ("row", "ground_truth"),
    [
        ({"prompt": "2+3?"}, None),
        ({"prompt": [QUESTION]}, None),
        ({"prompt": "2+3?", "completion": "5"}, "5"),
        ({"question": "2+3?", "answer": "5"}, "5"),
        ({"messages": [QUESTION, ANSWER]}, "5"),
    ],
)
def test_every_form_gives_the_same_prompt(row, ground_truth):
    (found,) = prompts_of(row).prompts
    ids = char_tokenizer().apply_chat_template([QUESTION], add_generation_prompt=True, return_dict=False)
    assert (list(found.token_ids), found.messages, found.reference) == (ids, [QUESTION], ground_truth)


def test_bad_prompts_are_named():
    for rows, changes, message in (
        ([{"prompt": "a"}, {"prompt": "a"}], {}, "train_dataset row 1 has the prompt id .* of an earlier row"),
        ([{"text": "a"}], {}, "train_dataset row 0 has the columns text"),
        ([{"prompt": "a" * 99}], {}, "no prompt of train_dataset has 64 tokens or fewer"),
        ([{"prompt": "a", "prompt_id": "p"}], {"scorer": "exact_match"}, "p"),
    ):
        with pytest.raises(InputError, match=message):
            prompts_of(*rows, **changes)
    with pytest.raises(InputError, match="train_dataset is a list"):
        to_prompts([{"prompt": "a"}], settings(), None, "train_dataset")
    with pytest.raises(InputError, match="max_prompt_length 90 plus max_new_tokens 8 exceeds max_length 96"):
        settings(max_prompt_length=90)


def test_held_out_prompts_need_a_scorer(tiny_model):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    args = settings(scorer=None, pairing="ground_truth", num_samples=1)
    with pytest.raises(InputError, match="eval_dataset is given, but there is no scorer"):
        OnlineTrainer(model=str(tiny_model), args=args, train_dataset=rows, eval_dataset=rows)


@pytest.mark.slow
def test_the_trainer_gives_the_losses_of_the_program(tiny_model, tmp_path):
    prompts = write_prompts(tmp_path / "prompts")
    changes = {"eval_prompts": str(prompts)}
    done = run_script("spin/run_online.py", write_online(tmp_path, tiny_model, prompts, **changes))
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = metrics(tmp_path / "out")
    values = online_values(tmp_path / "ours", tiny_model, prompts, **changes)
    for name in ("model_name_or_path", "dataset_mixer", "dataset_splits"):
        del values[name]
    rows = [json.loads(line) for line in (prompts / "train.jsonl").read_text().splitlines()]
    trainer = OnlineTrainer(
        model=str(tiny_model),
        args=OnlineConfig(**values, report_to="none"),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    for key in ("loss", "score"):
        ours = [entry[key] for entry in trainer.state.log_history if key in entry]
        assert ours == pytest.approx([entry[key] for entry in theirs["history"] if key in entry], abs=1e-6)
        assert len(ours) == 4
    assert trainer.evaluate()["eval_t0_score"] == pytest.approx(theirs["final"]["eval_t0_score"], abs=1e-6)
