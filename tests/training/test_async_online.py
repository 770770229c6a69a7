"""Online training that samples the next batch while it trains on the last one: against a plain loop, its resume, its failures."""

from __future__ import annotations

import copy
import json
import sys
import threading
from itertools import pairwise

import pyarrow.parquet as pq
import pytest
import torch

from spin import run_online
from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
from spin.alignment.generation import PromptRequest, SamplingConfig, sample_seed
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.transformers.backend import TransformersBackend
from spin.alignment.training.online import trainer as trainer_module
from spin.alignment.training.online.batch_ahead import PENDING_FILE
from spin.alignment.training.online.config import OnlineConfig
from tests.helpers import run_command, run_main
from tests.helpers.async_online import OVERLAPPING, SnapshotSampler, make_snapshot_sampler
from tests.helpers.online import share_of_letters, write_online, write_prompts
from tests.helpers.training import difference, metrics, weights


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture
def samplers(monkeypatch):
    """The samplers that trainings of this test have made."""
    made = []

    def make(*arguments):
        made.append(make_snapshot_sampler(*arguments))
        return made[-1]

    monkeypatch.setattr(trainer_module, "make_sampler", make)
    return made


def train(config):
    code, _, error = run_main(run_online.main, config)
    assert code == 0, error


def logps(model, prompt, response):
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), response].sum()


def one_step_off(folder, rows, steps, updates, freq, cap):
    """Online DPO as a reader of "Asynchronous RLHF" (arXiv 2410.18252) would write it, one model for each role."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = ChatEncoder(load_tokenizer(folder))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    settings = BackendSettings(str(folder), stop_ids=encoder.stop_ids, pad_id=encoder.pad_id)

    def draw(sampler, step):
        chosen = [rows[(step * 6 + place) % len(rows)] for place in range(6)]
        requests = [PromptRequest(row["prompt_id"], encoder.prompt_ids(row["messages"])) for row in chosen]
        seed = sample_seed(42, "step", step) % 2**31
        drawn = TransformersBackend(settings, sampler).generate(
            requests, SamplingConfig(num_samples=4, max_new_tokens=8, seed=seed)
        )
        return list(zip(requests, drawn, strict=True))

    reference = copy.deepcopy(policy)
    ahead = (draw(policy, 0), policy, reference)
    for step in range(steps):
        batch, sampler, anchor = ahead
        if step and step % freq == 0:
            reference = copy.deepcopy(policy)
        now = copy.deepcopy(policy)
        sampler = now if step == 0 else sampler
        ahead = (draw(now, step + 1), now, reference)  # before the update
        items = []
        for request, responses in batch:
            ids = [response.token_ids for response in responses]
            scores = [share_of_letters("", encoder.decode(one), "") for one in ids]
            if max(scores) > min(scores):
                pair = ids[scores.index(max(scores))], ids[scores.index(min(scores))]
                with torch.no_grad():
                    old, drawn = ([logps(model, request.token_ids, one) for one in pair] for model in (anchor, sampler))
                items.append((request.token_ids, pair, old, sum(drawn)))
        bounds = [round(number * len(items) / updates) for number in range(updates + 1)]
        for first, last in pairwise(bounds):
            losses = []
            for prompt, pair, (old_chosen, old_rejected), drawn in items[first:last]:
                chosen, rejected = (logps(policy, prompt, one) for one in pair)
                margin = (chosen - old_chosen) - (rejected - old_rejected)
                weight = 1.0 if cap is None else (chosen + rejected - drawn).detach().exp().clamp(max=cap)
                losses.append(-weight * torch.nn.functional.logsigmoid(0.1 * margin))
            torch.stack(losses).mean().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return policy.state_dict()


@pytest.mark.parametrize(
    ("updates", "freq", "changes"),
    [
        (1, 1, {}),
        (2, 2, {"updates_per_batch": 2, "ref_update_freq": 2, "max_tokens_per_batch": 90}),
        (1, 1000, {"ref_update_freq": -1, "importance_cap": 1.0}),
    ],
    ids=["reference that sampled", "two updates, reference of two steps", "fixed reference, weighted"],
)
def test_equals_a_plain_loop(tmp_path, tiny_model, prompts, samplers, updates, freq, changes):
    """Six steps of four that are an epoch: the batch ahead is also right across epochs."""
    train(write_online(tmp_path, tiny_model, prompts, max_steps=6, **OVERLAPPING, **changes))
    rows = [json.loads(line) for line in (prompts / "train.jsonl").read_text().splitlines()]
    expected = one_step_off(tiny_model, rows, 6, updates, freq, changes.get("importance_cap"))
    found, start = weights(tmp_path / "out"), weights(tiny_model)
    moved = sum((found[name] - start[name]).abs().sum().item() for name in start)
    assert sum((found[name] - expected[name]).abs().sum().item() for name in start) < 1e-3 * moved
    steps = [entry for entry in metrics(tmp_path / "out")["history"] if "staleness" in entry]
    assert [entry["staleness"] for entry in steps] == [(updates - 1) / 2] + [updates + (updates - 1) / 2] * 5
    assert samplers[0].calls == ["refresh", "respond", "start"] + ["finish", "refresh", "start"] * 4 + ["finish"]
    # The weights moved by about the learning rate, so that the ratios are not 1 but not far from it.
    assert all(0.3 < entry["importance/mean"] < 3 and entry["importance/kl"] > 1e-7 for entry in steps[1:])
    assert steps[0]["importance/mean"] == pytest.approx(1.0, abs=0.1 if updates > 1 else 1e-4)
    assert ("importance/clipped" in steps[0]) == ("importance_cap" in changes)


def test_the_next_batch_is_sampled_during_the_update(tmp_path, tiny_model, prompts, samplers, monkeypatch):
    """Whatever is sampled ahead waits for an update to begin, and the update for its sampling to end."""
    updating, sampled = ([threading.Event() for _ in range(2)] for _ in range(2))
    seen = []
    generate, run_pairs = SnapshotSampler.generate, trainer_module.OnlineTrainer.run_pairs

    def generate_during_update(self, requests, sampling):
        place = self.calls.count("start") - 1
        if place >= 0:
            seen.append(updating[place].wait(60))
        rows = generate(self, requests, sampling)
        if place >= 0:
            sampled[place].set()
        return rows

    def update_during_sampling(self, *arguments):
        place = self.state.global_step
        if place < 2:
            updating[place].set()
            seen.append(sampled[place].wait(60))
        return run_pairs(self, *arguments)

    monkeypatch.setattr(SnapshotSampler, "generate", generate_during_update)
    monkeypatch.setattr(trainer_module.OnlineTrainer, "run_pairs", update_during_sampling)
    train(write_online(tmp_path, tiny_model, prompts, max_steps=3, **OVERLAPPING))
    assert seen == [True] * 4


def test_a_random_order_is_known_ahead_and_held_out_prompts_wait(tmp_path, tiny_model, prompts, samplers):
    settings = {"train_sampling_strategy": "random", "eval_prompts": str(prompts), "eval_strategy": "steps"}
    config = write_online(
        *(tmp_path, tiny_model, prompts), max_steps=9, eval_steps=4, eval_temperatures=[0.0], **settings, **OVERLAPPING
    )
    train(config)
    history = metrics(tmp_path / "out")["history"]
    assert [entry["staleness"] for entry in history if "staleness" in entry] == [0] + [1] * 8
    assert [entry["step"] for entry in history if "eval_t0_score" in entry] == [4, 8, 9]
    calls = samplers[0].calls
    assert calls.count("respond") == 1 + 3 and calls.count("start") == 8
    assert all(before == "finish" for before, call in pairwise(calls[1:]) if call == "refresh" and before != "respond")


def test_two_processes_equal_one_and_a_killed_run_resumes(tmp_path, tiny_model, prompts, samplers):
    """Killed after step 5, while the batch of step 6 is under way: the one of step 5 is in the checkpoint of step 4."""
    settings = {"max_steps": 6, "updates_per_batch": 2, **OVERLAPPING}
    train(write_online(tmp_path / "one", tiny_model, prompts, **settings))
    two = {"per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 2, "ref_update_freq": 1}
    whole, killed = (
        str(write_online(tmp_path / name, tiny_model, prompts, **settings, **two)) for name in ("whole", "killed")
    )
    runs = json.dumps([(2, whole, 0), (2, killed, 5), (2, killed, 0)])
    done = run_command([sys.executable, "-m", "tests.helpers.async_online", runs], timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "resuming from" in done.stdout
    assert difference(tmp_path / "whole/out", tmp_path / "killed/out") == 0.0
    assert difference(tmp_path / "whole/out", tiny_model) > 1e-3
    assert difference(tmp_path / "whole/out", tmp_path / "one/out") < 1e-4
    histories = [metrics(tmp_path / name / "out")["history"] for name in ("whole", "killed")]
    same = ("loss", "score", "staleness", "rewards/margins", "importance/mean", "importance/max", "importance/kl_k1")
    steps = [[{key: entry[key] for key in same} for entry in history if "score" in entry] for history in histories]
    assert len(steps[0]) == 6 and steps[1] == steps[0]
    pending = pq.read_table(tmp_path / "whole/out/checkpoints/checkpoint-4" / PENDING_FILE).to_pylist()
    assert len(pending) == 6 * 4 and len({row["prompt_id"] for row in pending}) == 6
    assert not len(pq.read_table(tmp_path / "whole/out/checkpoints/checkpoint-6" / PENDING_FILE))


def test_a_resume_without_the_batch_of_its_checkpoint_is_refused(tmp_path, tiny_model, prompts, samplers):
    config = write_online(
        tmp_path, tiny_model, prompts, max_steps=2, save_strategy="steps", save_steps=1, **OVERLAPPING
    )
    train(config)
    (tmp_path / "out" / "metrics.json").unlink()
    for checkpoint in (tmp_path / "out" / "checkpoints").glob("checkpoint-*"):
        (checkpoint / PENDING_FILE).unlink()
        (checkpoint / "hashes.json").unlink()
    code, _, error = run_main(run_online.main, config)
    assert code == 2 and f"{PENDING_FILE} is missing, so the run cannot resume exactly" in error


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (InputError("the server is down: start it"), 2, "error: the server is down: start it"),
        (ZeroDivisionError("of the thread"), 1, "ZeroDivisionError: of the thread"),
    ],
)
def test_an_error_of_the_thread_ends_the_training_as_itself(
    tmp_path, tiny_model, prompts, samplers, monkeypatch, error, code, sentence
):
    generate = SnapshotSampler.generate

    def fail_at_the_third(self, requests, sampling):
        if self.calls.count("start") == 2:
            raise error
        return generate(self, requests, sampling)

    monkeypatch.setattr(SnapshotSampler, "generate", fail_at_the_third)
    found, _, said = run_main(run_online.main, write_online(tmp_path, tiny_model, prompts, **OVERLAPPING))
    assert found == code and said.strip().endswith(sentence)
    assert samplers[0].calls.count("start") == 2


def test_lost_weights_mean_a_batch_of_the_present_ones(tmp_path, tiny_model, prompts, samplers, monkeypatch):
    finish = SnapshotSampler.finish

    def lost_once(self):
        rows = finish(self)
        return None if self.calls.count("finish") == 2 else rows

    monkeypatch.setattr(SnapshotSampler, "finish", lost_once)
    train(write_online(tmp_path, tiny_model, prompts, **OVERLAPPING))
    steps = [entry for entry in metrics(tmp_path / "out")["history"] if "staleness" in entry]
    assert [entry["staleness"] for entry in steps] == [0, 1, 0, 1]
    assert samplers[0].calls.count("respond") == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"async_steps": 1}, r"backend transformers samples with the module that is trained.*\(vllm, openai\)"),
        ({"async_steps": 2}, "async_steps is 2: set it to 0 or more and at most 1"),
        ({"importance_cap": 0.5}, "importance_cap is 0.5: set it to 1 or more"),
        (
            {"importance_cap": 2.0, "temperature": 0.7},
            "temperature is 0.7, but importance_cap .* set temperature to 1,",
        ),
        ({"importance_cap": 2.0, "top_k": 5}, "top_k is 5, but importance_cap .* set top_k to 0,"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        OnlineConfig(use_cpu=True, report_to="none", scorer="tests.helpers.online:share_of_letters", **changes)
