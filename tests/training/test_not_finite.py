"""Numbers that are not finite stop a training with the rows that caused them, and ``spin replay`` finds the token."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from spin import cli, run_online, run_sft, run_spin
from spin.alignment.core.errors import NotFiniteError
from spin.alignment.models.folder import is_complete_checkpoint
from spin.alignment.training.optimizers import RMSprop
from tests.helpers import run_main
from tests.helpers.online import write_online, write_prompts
from tests.helpers.training import write_config

BAD_TOKEN = "7"  # only in the prompts of pairs 7 and 17


@pytest.fixture(scope="module")
def poisoned(tiny_model, tmp_path_factory):
    """The tiny model with an embedding of NaN for one character."""
    from spin.alignment.data.chat_encoder import load_tokenizer

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("poisoned") / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.embed_tokens.weight.data[load_tokenizer(str(folder)).convert_tokens_to_ids(BAD_TOKEN)] = math.nan
    model.save_pretrained(folder)
    return folder


def stopped(main, config, *arguments) -> str:
    """Run a training that must be stopped; return its one sentence."""
    code, _, err = run_main(main, config, *arguments)
    sentence = err.strip().splitlines()[-1]
    assert code == 2 and sentence.startswith("error: ") and "Traceback" not in err, err
    return sentence


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows-0.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_reference_that_is_not_finite_names_its_rows_and_stores_nothing(poisoned, pairs, tmp_path, batching):
    sentence = stopped(run_spin.main, write_config(tmp_path / "c.yaml", poisoned, pairs, batching=batching))
    folder = tmp_path / "out" / "failed-step-0"
    assert re.search(r"a reference log-prob of pair \d+ is not finite before the first step for prompt p", sentence)
    assert f"`spin replay {folder}`" in sentence
    assert {row["prompt_id"] for row in rows_of(folder)} <= {"p7", "p17"}
    assert not list((tmp_path / "out" / "reference").glob("*")) and not is_complete_checkpoint(tmp_path / "out")
    code, said, err = run_main(cli.main, "replay", folder)
    assert code == 0, err
    assert f" of {pairs}: loss nan; first not finite: log-prob nan at token 0 of chosen (id " in said


def test_a_loss_that_is_not_finite_names_the_pair_and_leaves_the_checkpoint(tiny_model, pairs, tmp_path, monkeypatch):
    from spin.alignment.logprobs.reference_store import ReferenceLogps

    real = ReferenceLogps.__getitem__

    def damaged(self, index):
        found = real(self, index)
        return {name: values * (math.inf if index == 9 else 1) for name, values in found.items()}

    config = write_config(tmp_path / "c.yaml", tiny_model, pairs, save_strategy="steps", save_steps=1)
    monkeypatch.setattr(ReferenceLogps, "__getitem__", damaged)
    sentence = stopped(run_spin.main, config)
    step = int(sentence.split("at step ")[1].split()[0])
    assert f"the loss or a log-prob is not finite (the loss is nan) at step {step} for prompt p" in sentence
    folder = tmp_path / "out" / f"failed-step-{step}"
    (row,) = rows_of(folder)
    assert f"for prompt {row['prompt_id']} of {pairs}: see" in sentence and math.isinf(row["chosen_reference"][0])
    record = json.loads((folder / "step.json").read_text())
    assert record["settings"]["beta"] == 0.1 and "hub_token" not in record["settings"]
    assert torch.load(folder / "random-state-0.pt")["cpu"].dtype == torch.uint8
    assert not is_complete_checkpoint(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")].count(f"checkpoint-{step}") == 0
    if step > 1:
        assert (tmp_path / "out" / f"checkpoint-{step - 1}" / "trainer_state.json").is_file()
    code, said, _ = run_main(cli.main, "replay", folder, "--model", tiny_model)
    assert code == 0 and "first not finite: reference log-prob -inf at token 0 of chosen" in said
    # The same command goes on once the damage is undone.
    monkeypatch.undo()
    assert run_main(run_spin.main, config)[0] == 0


def test_a_log_prob_of_minus_infinity_stops_even_where_the_loss_is_finite():
    from types import SimpleNamespace

    from spin.alignment.methods.losses import LossInputs, find_loss
    from spin.alignment.training.objective import PairObjective

    loss = find_loss("hinge")
    args = SimpleNamespace(loss=loss, loss_arguments={"beta": 1.0}, nll_weight=0.0, sampled_sides=())
    objective = PairObjective(args, SimpleNamespace(value=0.0))
    policy = torch.tensor([[0.0], [0.0], [-math.inf], [-1.0]])  # two chosen, two rejected responses of one token
    inputs = LossInputs(policy, torch.zeros(4, 1), torch.ones(4, 1, dtype=torch.bool))
    assert objective(inputs, 1.0, training=True, counted=True, step=1).isfinite()
    assert objective.take_faults().tolist() == [True, False] and not len(objective.take_faults())


def test_a_gradient_that_is_not_finite_stops_before_the_update(tiny_model, pairs, tmp_path, monkeypatch):
    from spin.alignment.training.trainer import SPINTrainer

    real = SPINTrainer.training_step

    def overflowing(self, model, inputs, num_items_in_batch=None):
        loss = real(self, model, inputs, num_items_in_batch)
        if self.state.global_step == 2:
            next(model.parameters()).grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(SPINTrainer, "training_step", overflowing)
    config = write_config(tmp_path / "c.yaml", tiny_model, pairs, save_strategy="steps", save_steps=1)
    sentence = stopped(run_spin.main, config)
    assert "the gradient norm is inf at step 3 for one of 4 rows (" in sentence
    assert len(rows_of(tmp_path / "out" / "failed-step-3")) == 4
    saved = [path.name for path in (tmp_path / "out").glob("checkpoint-*")]
    assert sorted(saved) == ["checkpoint-1", "checkpoint-2"]
    code, said, _ = run_main(cli.main, "replay", tmp_path / "out" / "failed-step-3")
    assert code == 0 and "checkpoint-2" in said and "all rows are finite" in said


def test_weights_that_are_not_finite_never_become_a_checkpoint(tiny_model, pairs, tmp_path, monkeypatch):
    """An update can overflow although its gradient is finite; the next loss would tell, but the checkpoint comes first."""
    real, steps = RMSprop.step, []

    def overflowing(self, closure=None):
        real(self, closure)
        steps.append(len(steps))
        if len(steps) == 3:
            self.param_groups[0]["params"][0].data[0, 0] = math.inf

    monkeypatch.setattr(RMSprop, "step", overflowing)
    config = write_config(tmp_path / "c.yaml", tiny_model, pairs, save_strategy="steps", save_steps=1)
    assert "the weight model.embed_tokens.weight is not finite after the update" in stopped(run_spin.main, config)
    complete = [path.parent.name for path in (tmp_path / "out").glob("checkpoint-*/trainer_state.json")]
    assert sorted(complete) == ["checkpoint-1", "checkpoint-2"]


def test_sft_stops_too(poisoned, tmp_path):
    data = write_prompts(tmp_path / "data", 12, answered=True)
    config = write_config(
        tmp_path / "c.yaml", poisoned, data, dataset_splits=["train"], train_sampling_strategy="sequential"
    )
    sentence = stopped(run_sft.main, config)
    assert f"the loss is nan at step 2 for prompt p7 of {data}: see" in sentence
    code, said, _ = run_main(cli.main, "replay", tmp_path / "out" / "failed-step-2")
    assert code == 0 and said.count("first not finite") == 1 and "1 of 1 rows are not finite" in said


def test_sampling_online_stops_too(poisoned, tmp_path):
    prompts = write_prompts(tmp_path / "data", 12)
    sentence = stopped(run_online.main, write_online(tmp_path, poisoned, prompts, per_device_train_batch_size=12))
    assert "sampling found that the logits of the model are not finite after prompt p" in sentence
    assert "at step 1" in sentence and len(rows_of(tmp_path / "out" / "failed-step-1")) == 12
    code, said, _ = run_main(cli.main, "replay", tmp_path / "out" / "failed-step-1")
    assert code == 0 and "prompt p7: loss nan" in said and "1 of 12 rows are not finite" in said


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_generated_log_prob_that_is_not_finite_is_not_written(value):
    from spin.alignment.generation.base import Response
    from spin.alignment.generation.fraction_work import check_finite

    with pytest.raises(NotFiniteError, match="a log-prob of a response to prompt p3 is not finite"):
        check_finite("p3", [Response([5, 6], "stop", [-1.0, value])])


def test_replay_refuses_another_folder(tmp_path):
    code, _, err = run_main(cli.main, "replay", tmp_path)
    assert code == 2 and "is no record of a failed step" in err


RECORD = {
    "step": 3,
    "what": "the loss is nan",
    "kind": "pairs",
    "model": "",
    "settings": {"loss_type": "sigmoid", "loss_arguments": {"beta": 0.1}},
}
ROW = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}


@pytest.mark.parametrize(
    ("record", "rows", "problem"),
    [
        ([], [ROW], "must be a mapping"),
        ({}, [ROW], "missing 4 required"),
        (RECORD | {"kind": "other"}, [ROW], "other"),
        (RECORD | {"settings": {"loss_type": "sigmoid"}}, [ROW], "it lacks loss_arguments"),
        (RECORD, [], "it has no rows"),
        (RECORD, [[]], "it lacks"),
        (RECORD, ["half of a r"], "it lacks"),
        (RECORD, [ROW, {"prompt_ids": [5], "chosen_ids": [6]}], "it lacks rejected_ids"),
        (RECORD | {"kind": "sft"}, [{"input_ids": [5]}], "it lacks labels"),
    ],
)
def test_replay_names_a_damaged_record(tmp_path, record, rows, problem):
    (tmp_path / "step.json").write_text(json.dumps(record))
    (tmp_path / "rows-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run_main(cli.main, "replay", tmp_path)
    assert code == 2 and re.fullmatch(
        rf"error: the record in {tmp_path} is damaged \(.*{problem}.*\): run the .*\n", err
    )


def test_replay_refuses_a_model_of_another_vocabulary(tiny_model, tmp_path):
    (tmp_path / "step.json").write_text(json.dumps(RECORD | {"model": str(tiny_model)}))
    (tmp_path / "rows-0.jsonl").write_text(json.dumps(ROW | {"rejected_ids": [100_000]}) + "\n")
    code, _, err = run_main(cli.main, "replay", tmp_path)
    assert code == 2 and f"the record in {tmp_path} contains token id 100000" in err


def test_the_error_is_bad_input_and_a_floating_point_error():
    assert issubclass(NotFiniteError, FloatingPointError) and NotFiniteError("x").rows == ()
