"""From prompts and responses to the pairs of an online step, without training."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from spin import run_online
from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
from spin.alignment.data.config import DataConfig
from spin.alignment.generation.base import Response
from spin.alignment.methods.losses import LOSSES, LossInputs
from spin.alignment.rewards import GroupLabels
from spin.alignment.training.online import trainer as trainer_module
from spin.alignment.training.online.labels import PairMaker, StepCounts
from spin.alignment.training.online.prompts import OnlinePrompt, load_splits, longest_pairs
from tests.helpers import run_main
from tests.helpers.online import write_online, write_prompts
from tests.helpers.training import metrics


def test_a_long_ground_truth_is_cut_and_planned_for(tmp_path, tiny_model):
    """As offline: prompt and response have at most max_length tokens, and memory is planned for the longest."""

    folder = tmp_path / "long"
    folder.mkdir()
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "yes " * 40}]
    (folder / "train.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    encoder = ChatEncoder(load_tokenizer(tiny_model))
    settings = SimpleNamespace(pairing="ground_truth", eval_prompts=None, seed=0, max_new_tokens=8)
    data = DataConfig(dataset_mixer={str(folder): 1.0}, dataset_splits=["train"], max_length=96, max_prompt_length=64)
    (prompt,) = load_splits(data, settings, encoder)[0]["train"].prompts
    whole = encoder.response_ids(turns)
    assert list(prompt.ground_truth_ids) == whole[: 96 - len(prompt.token_ids)] != whole
    (planned,) = longest_pairs([prompt], settings.max_new_tokens, encoder.end_id).rows
    assert len(planned["chosen_ids"]) == len(prompt.ground_truth_ids)
    (own,) = load_splits(data, SimpleNamespace(**vars(settings) | {"pairing": "best_vs_worst"}), encoder)[0][
        "train"
    ].prompts
    assert own.ground_truth_ids == ()  # nothing is trained on it
    broken = DataConfig(dataset_mixer={str(folder): 1.5}, dataset_splits=["train"], max_length=96, max_prompt_length=64)
    with pytest.raises(InputError, match=r"the fraction 1\.5: set it above 0 and at most 1"):
        load_splits(broken, settings, encoder)


def test_a_response_without_a_partner_is_counted(tiny_model):

    encoder = ChatEncoder(load_tokenizer(tiny_model))
    settings = SimpleNamespace(
        pairing="every_sample", loss_type="sppo_reward", baseline="prompt", soft_mean_b=1.0, needs=()
    )
    scorer = SimpleNamespace(label=lambda groups: [GroupLabels([0.0, None, 1.0, 3.0]) for _ in groups])
    turns = [{"role": "user", "content": "say"}]
    prompt = OnlinePrompt("p", tuple(encoder.prompt_ids(turns)), turns, None)
    responses = [Response([number, encoder.end_id], "stop", None) for number in range(4, 8)]
    counts = StepCounts()
    (pair,) = PairMaker(settings, encoder, scorer).make([prompt], [responses], counts)
    assert (counts.failed, counts.unpaired, counts.pairs, counts.without_pair) == (1, 1, 1, 0)
    assert (pair["chosen_ids"][0], pair["rejected_ids"][0]) == (4, 6)
    baseline = math.log((1 + math.e + math.e**3) / 3)  # the soft mean is over all three that have a score
    assert [pair["chosen_reward"], pair["rejected_reward"]] == pytest.approx([-baseline, 1 - baseline], rel=1e-12)


@pytest.mark.parametrize("samples", [1, 3])
def test_odd_numbers_weigh_every_response_equally(tiny_model, samples):
    """verl's SPPO: the mean over all responses of (log-ratio - (reward - soft mean over the batch))^2."""
    encoder = ChatEncoder(load_tokenizer(tiny_model))
    settings = SimpleNamespace(
        pairing="every_sample", loss_type="sppo_reward", baseline="batch", soft_mean_b=1.0, needs=()
    )
    scores = [[0.5 * number + sample for sample in range(samples)] for number in range(4)]
    scorer = SimpleNamespace(label=lambda groups: [GroupLabels(list(own)) for own in scores])
    turns = [{"role": "user", "content": "say"}]
    prompts = [OnlinePrompt(f"p{number}", tuple(encoder.prompt_ids(turns)), turns, None) for number in range(4)]
    responses = [[Response([4 + sample, encoder.end_id], "stop", None) for sample in range(samples)] for _ in prompts]
    maker, counts = PairMaker(settings, encoder, scorer), StepCounts()
    pairs = maker.make(prompts, responses, counts)
    columns = maker.relative_columns()
    maker.subtract_baseline(pairs, [pair[column] for column in columns for pair in pairs])
    assert (counts.unpaired, counts.without_pair, counts.pairs) == (0, 0, 4 * samples)
    sides = torch.tensor([[pair["chosen_reward"], pair["rejected_reward"]] for pair in pairs], dtype=torch.float64).T
    ratios = torch.zeros(2 * len(pairs), 1, dtype=torch.float64)
    inputs = LossInputs(ratios, ratios, torch.ones_like(ratios), labels={"reward": sides.flatten()})
    flat = [score for own in scores for score in own]
    baseline = math.log(sum(math.exp(score) for score in flat) / len(flat))
    expected = sum((score - baseline) ** 2 for score in flat) / len(flat)
    assert LOSSES["sppo_reward"](inputs, eta=1.0).losses.mean().item() == pytest.approx(expected, rel=1e-12)


def test_a_ground_truth_that_could_not_be_scored_is_counted():
    from spin.alignment.training.online.labels import StepCounts

    row = {"rejected_token_ids": [1], "rejected_finish_reason": "stop", "rejected_score": 1.0, "chosen_score": None}
    read, unread = StepCounts(), StepCounts()
    read.add([row, row | {"rejected_score": None}], reads_ground_truth=True)
    unread.add([row], reads_ground_truth=False)
    assert (read.scored, read.failed) == (1, 2)
    assert (unread.scored, unread.failed) == (1, 0)


def test_a_reference_that_is_the_policy_needs_no_pass_of_its_own(tmp_path, tiny_model, monkeypatch):
    """Its log-probs are those of the forward pass of the update, if that is the only one of its step."""
    prompts = write_prompts(tmp_path / "prompts")
    passes = []
    real = trainer_module.attach_reference_logps
    monkeypatch.setattr(
        trainer_module, "attach_reference_logps", lambda *arguments: (passes.append(1), real(*arguments))
    )
    for name, changes in {"one": {}, "two": {"updates_per_batch": 2}, "older": {"ref_update_freq": 2}}.items():
        passes.clear()
        config = write_online(tmp_path / name, tiny_model, prompts, max_steps=2, **changes)
        code, _, err = run_main(run_online.main, config)
        assert code == 0, err
        assert len(passes) == (0 if name == "one" else 2)
    history = metrics(tmp_path / "one" / "out")["history"]
    assert [row["kl"] for row in history if "kl" in row] == [0.0, 0.0]
