"""Online training against a plain loop, its reference, its resume, several processes, and its refusals."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from spin import run_online
from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
from spin.alignment.generation import PromptRequest, SamplingConfig, sample_seed
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.transformers.backend import TransformersBackend
from tests.helpers import run_command, run_main
from tests.helpers.online import share_of_letters, write_online, write_prompts
from tests.helpers.training import difference, launcher, metrics, weights


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts"))


def train(config: Path, *arguments: str, launch: tuple[str, ...] = ()) -> str:
    done = run_command([sys.executable, *launch, "spin/run_online.py", config, *arguments], timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The sum of a response's log-probs, from the model's whole forward."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), response].sum()


def plain_loop(folder: Path, rows: list[dict], steps: int, updates: int, freq: int, loss_of) -> dict[str, torch.Tensor]:
    """Online training as a reader of the papers would write it: no packing, no store, a second model as reference."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = ChatEncoder(load_tokenizer(folder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    reference = model
    for step in range(steps):
        if step % freq == 0:
            reference = copy.deepcopy(model)
        seed = sample_seed(42, "step", step) % 2**31
        settings = BackendSettings(str(folder), stop_ids=encoder.stop_ids, pad_id=encoder.pad_id)
        chosen = [rows[(step * 6 + place) % len(rows)] for place in range(6)]
        requests = [PromptRequest(row["prompt_id"], encoder.prompt_ids(row["messages"])) for row in chosen]
        drawn = TransformersBackend(settings, model).generate(
            requests, SamplingConfig(num_samples=4, max_new_tokens=8, seed=seed)
        )
        items = []
        for request, responses in zip(requests, drawn, strict=True):
            ids = [response.token_ids for response in responses]
            scores = [share_of_letters("", encoder.decode(one), "") for one in ids]
            items += loss_of.items(list(request.token_ids), ids, scores)
        with torch.no_grad():
            old = [[logps(reference, prompt, one) for one in pair] for prompt, pair, _ in items]
        bounds = [round(number * len(items) / updates) for number in range(updates + 1)]
        for first, last in pairwise(bounds):
            losses = []
            for (prompt, pair, rewards), before in zip(items[first:last], old[first:last], strict=True):
                ratios = [logps(model, prompt, one) - start for one, start in zip(pair, before, strict=True)]
                losses.append(loss_of(ratios, rewards))
            torch.stack(losses).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


class OnlineDPO:
    """Best against worst; sigmoid with beta 0.1 (methods: online DPO)."""

    def items(self, prompt, ids, scores):
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        return [] if max(scores) == min(scores) else [(prompt, (ids[best], ids[worst]), None)]

    def __call__(self, ratios, rewards):
        return -torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1]))


class OnlineIPO(OnlineDPO):
    """The same pairs; (margin - 1/(2 beta))^2 with beta 0.1 (methods: online DPO)."""

    def __call__(self, ratios, rewards):
        return (ratios[0] - ratios[1] - 5.0) ** 2


class SoftMeanSPPO:
    """Every sample; (sum of log-ratios - eta (r - log mean exp r))^2 with eta 1 (methods: SPPO online)."""

    def items(self, prompt, ids, scores):
        baseline = math.log(sum(math.exp(score) for score in scores) / len(scores))
        rewards = [score - baseline for score in scores]
        return [(prompt, ids[start : start + 2], rewards[start : start + 2]) for start in range(0, len(ids), 2)]

    def __call__(self, ratios, rewards):
        return sum((ratio - reward) ** 2 for ratio, reward in zip(ratios, rewards, strict=True)) / 2


@pytest.mark.parametrize(
    ("method", "updates", "freq", "changes"),
    [
        (OnlineDPO(), 1, 1, {}),
        (OnlineDPO(), 2, 3, {"updates_per_batch": 2, "ref_update_freq": 3, "max_tokens_per_batch": 90}),
        (OnlineDPO(), 2, 1, {"updates_per_batch": 2, "batching": "padded"}),
        (OnlineIPO(), 1, 2, {"loss_type": "ipo", "ref_update_freq": 2}),
        (OnlineDPO(), 1, 1000, {"ref_update_freq": -1}),
        (SoftMeanSPPO(), 2, 2, {"pairing": "every_sample", "loss_type": "sppo_reward", "ref_update_freq": 2}),
    ],
    ids=[
        "online DPO",
        "two updates, reference of three steps",
        "padded",
        "online IPO",
        "fixed reference",
        "SPPO with rewards",
    ],
)
def test_equals_a_plain_loop(tmp_path, tiny_model, prompts, method, updates, freq, changes):
    if isinstance(method, SoftMeanSPPO):
        changes = changes | {"updates_per_batch": 2}
    config = write_online(tmp_path, tiny_model, prompts, **changes)
    code, _, error = run_main(run_online.main, config)
    assert code == 0, error
    rows = [json.loads(line) for line in (prompts / "train.jsonl").read_text().splitlines()]
    expected = plain_loop(tiny_model, rows, 4, updates, freq, method)
    found, start = weights(tmp_path / "out"), weights(tiny_model)
    moved = max((found[name] - start[name]).abs().max().item() for name in start)
    apart = max((found[name] - expected[name]).abs().max().item() for name in start)
    assert moved > 1e-3
    # AdamW turns rounding of near-zero gradients into a step; a wrong pair or reference moves weights by the whole of it.
    assert apart < 0.05 * moved
    assert sum((found[name] - expected[name]).abs().sum().item() for name in start) < 1e-3 * sum(
        (found[name] - start[name]).abs().sum().item() for name in start
    )


def test_one_response_per_prompt_against_the_batch(tmp_path, tiny_model, prompts):
    """The settings of verl's recipe "sppo": every prompt gives one row, and the loss is not zero although there is no pair."""
    changes = {"pairing": "every_sample", "loss_type": "sppo_reward", "baseline": "batch", "num_samples": 1}
    train(write_online(tmp_path, tiny_model, prompts, max_steps=2, updates_per_batch=2, **changes))
    steps = [entry for entry in metrics(tmp_path / "out")["history"] if "score" in entry]
    assert [(entry["pairs_per_prompt"], entry["without_pair"], entry["unpaired"]) for entry in steps] == [(1, 0, 0)] * 2
    assert all(entry["loss"] > 0 for entry in steps)


def test_killed_and_resumed_gives_the_same_numbers(tmp_path, tiny_model, prompts):
    settings = {"max_steps": 6, "ref_update_freq": 4, "save_strategy": "steps", "save_steps": 1, "updates_per_batch": 2}
    whole = write_online(tmp_path / "whole", tiny_model, prompts, **settings)
    train(whole)
    killed = write_online(tmp_path / "killed", tiny_model, prompts, **settings)
    script = (
        "import os, signal, sys\n"
        "from transformers import TrainerCallback\n"
        "from spin import run_online\n"
        "from spin.alignment.training.online import trainer\n"
        "class Kill(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **_):\n"
        "        if state.global_step == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "plain = trainer.OnlineTrainer.__init__\n"
        "def patched(self, *arguments, **settings): plain(self, *arguments, callbacks=[Kill()], **settings)\n"
        "trainer.OnlineTrainer.__init__ = patched\n"
        "run_online.main(sys.argv[1:])\n"
    )
    done = run_command([sys.executable, "-c", script, killed], timeout=300)
    assert done.returncode == -9, done.stderr[-2000:]
    assert "resuming from" in train(killed)
    assert difference(tmp_path / "whole" / "out", tmp_path / "killed" / "out") == 0.0
    histories = [metrics(tmp_path / name / "out")["history"] for name in ("whole", "killed")]
    same = ("loss", "score", "pairs_per_prompt", "rewards/margins", "response_length")
    steps = [[{key: entry.get(key) for key in same} for entry in history if "score" in entry] for history in histories]
    assert len(steps[0]) == 6
    assert steps[0][2:] == steps[1][2:]


@pytest.mark.parametrize("freq", [4, -1])
def test_a_lost_reference_ends_the_resume(tmp_path, tiny_model, prompts, freq):
    config = write_online(
        tmp_path, tiny_model, prompts, max_steps=2, ref_update_freq=freq, save_strategy="steps", save_steps=1
    )
    train(config)
    (tmp_path / "out" / "metrics.json").unlink()
    for checkpoint in (tmp_path / "out" / "checkpoints").glob("checkpoint-*"):
        (checkpoint / "reference.safetensors").unlink()
        (checkpoint / "hashes.json").unlink()  # as an earlier version wrote it: nothing says which files it had
    code, _, error = run_main(run_online.main, config)
    assert code == 2
    assert "reference.safetensors is missing, so the run cannot resume exactly" in error


def test_another_reward_is_another_training(tmp_path, tiny_model, prompts, monkeypatch):
    module = tmp_path / "reward_of_this_test.py"
    module.write_text("def score(prompt, response, reference):\n    return float(len(response))\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = write_online(tmp_path, tiny_model, prompts, scorer="reward_of_this_test:score", max_steps=1)
    assert run_main(run_online.main, config)[0] == 0
    module.write_text(module.read_text().replace("float(", "-float("))
    code, _, error = run_main(run_online.main, config)
    assert code == 2
    assert "belongs to another training run (scorer_module_reward_of_this_test differ)" in error


def test_two_processes_equal_one(tmp_path, tiny_model, prompts):
    one = write_online(tmp_path / "one", tiny_model, prompts, ref_update_freq=2)
    train(one)
    two = write_online(tmp_path / "two", tiny_model, prompts, ref_update_freq=2, per_device_train_batch_size=3)
    train(two, launch=tuple(launcher("cpu.yaml")))
    start, first, second = (weights(folder) for folder in (tiny_model, tmp_path / "one/out", tmp_path / "two/out"))
    moved = sum((first[name] - start[name]).abs().sum().item() for name in start)
    apart = sum((first[name] - second[name]).abs().sum().item() for name in start)
    assert apart < 1e-3 * moved


def test_a_process_may_have_neither_pair_nor_held_out_prompt(tmp_path, tiny_model, prompts):
    """One pair a step and one held-out prompt for two processes: every reduction still finds both."""
    settings = {
        "scorer": "tests.helpers.online:letters_of_some",
        "max_steps": 3,
        "eval_prompts": str(prompts),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_limit": 1,
    }
    train(write_online(tmp_path / "one", tiny_model, prompts, **settings))
    two = write_online(tmp_path / "two", tiny_model, prompts, **settings, per_device_train_batch_size=3)
    train(two, launch=tuple(launcher("cpu.yaml")))
    first, second = (metrics(tmp_path / name / "out")["history"] for name in ("one", "two"))
    assert [entry["pairs_per_prompt"] for entry in second if "score" in entry] == pytest.approx([1 / 6] * 3)
    for name in ("rewards/margins", "logps/chosen", "eval_t0_score", "eval_t1_length"):
        values = [[entry[name] for entry in history if name in entry] for history in (first, second)]
        assert len(values[0]) >= 3
        assert values[1] == pytest.approx(values[0], abs=1e-4), name


def test_no_pair_means_no_update(tmp_path, tiny_model, prompts):
    config = write_online(tmp_path, tiny_model, prompts, scorer="tests.helpers.online:always_same", max_steps=2)
    code, _, error = run_main(run_online.main, config)
    assert code == 0, error
    assert difference(tiny_model, tmp_path / "out") == 0.0
    logged = [entry for entry in metrics(tmp_path / "out")["history"] if "without_pair" in entry]
    assert [entry["without_pair"] for entry in logged] == [1.0, 1.0]


def test_validation_and_lora(tmp_path, tiny_model, prompts):
    config = write_online(
        tmp_path,
        tiny_model,
        prompts,
        use_peft=True,
        lora_r=4,
        ref_update_freq=2,
        eval_prompts=str(prompts),
        eval_strategy="steps",
        eval_steps=2,
        eval_limit=4,
    )
    code, _, error = run_main(run_online.main, config)
    assert code == 0, error
    assert difference(tiny_model, tmp_path / "out") > 1e-4
    record = metrics(tmp_path / "out")
    assert record["prompts"] == {"train": 24, "test": 4}
    held_out = [entry for entry in record["history"] if "eval_t0_score" in entry]
    assert {entry["step"] for entry in held_out} == {2, 4}
    assert all(0 <= entry["eval_t1_score"] <= 1 and entry["eval_t0_length"] <= 8 for entry in held_out)


def test_online_spin_trains_on_the_ground_truth(tmp_path, tiny_model):
    answered = write_prompts(tmp_path / "answered", answered=True)
    config = write_online(
        tmp_path,
        tiny_model,
        answered,
        pairing="ground_truth",
        scorer=None,
        num_samples=1,
        learning_rate=5e-3,
        max_steps=12,
    )
    code, _, error = run_main(run_online.main, config)
    assert code == 0, error
    history = [entry for entry in metrics(tmp_path / "out")["history"] if "logps/chosen" in entry]
    assert history[8]["logps/chosen"] > history[0]["logps/chosen"] + 0.3  # the same prompts, two epochs later


def test_remote_code_of_the_policy_does_not_disturb_a_rule(tmp_path, tiny_model, prompts):
    config = write_online(tmp_path, tiny_model, prompts, trust_remote_code=True, max_steps=1)
    code, _, error = run_main(run_online.main, config)
    assert code == 0, error


REFUSED = [
    ({"ref_update_freq": 0}, "ref_update_freq is 0: set it to 1 or more"),
    ({"ref_update_freq": -2}, "ref_update_freq is -2: set it to 1 or more"),
    ({"updates_per_batch": 0}, "updates_per_batch is 0: set it to 1 or more"),
    ({"num_samples": 1}, "pairing best_vs_worst needs at least 2 responses per prompt, but there is 1"),
    (
        {"pairing": "every_sample", "loss_type": "sppo_reward", "num_samples": 1},
        "relative to its prompt's mean a response alone always has the reward 0: sample 2 or more, or set baseline: batch",
    ),
    ({"scorer": None}, "pairing best_vs_worst compares scores, but no scorer is set"),
    ({"scorer": "no_such_module:f"}, "no_such_module"),
    ({"scorer": "nonsense"}, "nonsense"),
    ({"loss_type": "sppo_reward"}, "loss_type sppo_reward reads rewards, which pairing best_vs_worst does not write"),
    ({"pairing": "every_sample"}, "prefers neither response, but loss_type sigmoid compares two"),
    ({"baseline": "batch"}, "baseline is batch, but pairing best_vs_worst does not use a baseline"),
    ({"baseline": "mean"}, "is 'mean': choose one of prompt, batch"),
    ({"backend": "none"}, "unknown online generation backend 'none'"),
    ({"backend": "openai"}, "backend is openai, but server_url is not set"),
    ({"server_url": "http://127.0.0.1:1/v1"}, "backend transformers does not use it: remove it"),
    ({"tensor_parallel_size": 2}, "backend transformers does not use it: remove it"),
    ({"backend": "vllm", "tensor_parallel_size": 3}, "has 4 attention heads, which it does not divide"),
    ({"temperature": 0.0}, "temperature 0 draws the same response every time"),
    ({"eval_strategy": "steps"}, "there are no held-out prompts: set eval_prompts"),
    (
        {"eval_temperatures": [1.0, 1.0], "eval_prompts": "some/data"},
        "list one or more temperatures, without duplicates",
    ),
    ({"dataset_splits": ["train", "test"]}, "set eval_prompts for held-out"),
    ({"max_new_tokens": 60}, "exceeds max_length 96"),
    ({"max_prompt_length": 3}, "has 3 tokens or fewer: raise max_prompt_length"),
    ({"max_length": 1024, "max_new_tokens": 500}, "but the model takes 512"),
    ({"reference_dir": "somewhere"}, "online training stores no reference log-probs"),
    ({"alpha": 0.5}, "the reference is the policy itself"),
    ({"reverse": True}, "online pairs are created from their labels"),
    ({"init_from_config": True}, "init_from_config cannot be used here"),
    ({"load_in_8bit": True, "use_peft": True}, "do not work online"),
    ({"gpu_memory_utilization": 1.5}, "set it to a number above 0 and at most 1"),
    ({"gpu_memory_utilization": 0.5}, "backend transformers does not use it"),
    ({"soft_mean_b": -1.0}, "soft_mean_b is -1.0: set it to 0 or more"),
    ({"soft_mean_b": math.nan}, "soft_mean_b is nan: set it to 0 or more"),
    ({"eval_limit": 5}, "eval_limit is 5, but there are no held-out prompts"),
    ({"soft_mean_b": 2.0}, "soft_mean_b is 2.0, but pairing best_vs_worst does not use a baseline"),
    (
        {"pairing": "ground_truth", "scorer": None, "num_samples": 1, "score_cache": "kept"},
        "score_cache is kept, but no scorer is set",
    ),
    (
        {"scorer": "judge", "base_url": "http://127.0.0.1:1/v1", "eval_prompts": "some/data", "eval_strategy": "steps"},
        "the one response to a held-out prompt has no other to compare with",
    ),
    ({"pairing": "ground_truth", "scorer": None, "num_samples": 1}, "has no ground truth, which pairing ground_truth"),
    ({"scorer": "math_answer"}, "scorer math_answer compares with the ground truth, but prompt p0 has none"),
    ({"scorer_model": "somewhere"}, "scorer_model"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_bad_settings_end_before_a_model_is_loaded(tmp_path, tiny_model, prompts, monkeypatch, changes, sentence):
    def fail(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("spin.alignment.training.run.load_policy", fail)
    code, _, error = run_main(run_online.main, write_online(tmp_path, tiny_model, prompts, **changes))
    assert code == 2, error
    assert sentence in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_engine_shows_before_a_model_is_loaded(tmp_path, tiny_model, prompts, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "vllm" else find(name, *more))
    monkeypatch.delattr("spin.alignment.training.run.load_policy")
    code, _, error = run_main(run_online.main, write_online(tmp_path, tiny_model, prompts, backend="vllm"))
    assert code == 2 and "vLLM is not installed" in error
    assert not (tmp_path / "out").exists()


def test_the_pairing_of_prompts_without_truth_is_refused(tmp_path, tiny_model, prompts):
    config = write_online(tmp_path, tiny_model, prompts, pairing="ground_truth", scorer=None, num_samples=1)
    code, _, error = run_main(run_online.main, config)
    assert code == 2
    assert "has no ground truth, which pairing ground_truth" in error


def test_processes_that_cannot_share_engines_are_refused_before_a_model_is_loaded(
    tmp_path, tiny_model, prompts, monkeypatch
):
    monkeypatch.delattr("spin.alignment.training.run.load_policy")
    config = write_online(tmp_path, tiny_model, prompts, backend="vllm", tensor_parallel_size=2)
    code, _, error = run_main(run_online.main, config)
    assert code == 2 and "training processes on this machine, 1, is not a multiple of it" in error
