"""Training on packed rows: the trajectory of padded ones, whatever the budget; refusals; a store that is taken up again."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from spin import run_spin
from spin.alignment.core.errors import InputError
from spin.alignment.core.sides import SIDES
from spin.alignment.logprobs import reference
from spin.alignment.logprobs.batch import PairDataset
from spin.alignment.logprobs.micro_batches import MicroBatcher
from spin.alignment.logprobs.pair_forward import PairForward
from spin.alignment.logprobs.reference import compute_reference
from spin.alignment.logprobs.reference_store import ReferenceKey, ReferenceLogps, store_path
from spin.alignment.methods.losses import LOSSES
from spin.alignment.training.trainer import SPINConfig, SPINTrainer
from tests.helpers import char_tokenizer, run_main, save_tiny_model, tiny_llama
from tests.logprobs.test_packed_rows import VOCAB, random_pairs, tiny

STEPS = 20


def dataset(count: int = 40, weights: bool = False, responses: tuple[str, ...] = SIDES) -> PairDataset:
    pairs = random_pairs(count, weights=weights, responses=responses)
    return PairDataset(Dataset.from_list([{k: v for k, v in pair.items() if "reference" not in k} for pair in pairs]))


def run(folder, model=None, weights: bool = False, resume: str | None = None, **settings):
    """Train for STEPS steps; return the trainer."""
    torch.manual_seed(0)
    values = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-3,
        "optim": "adamw_torch",
        "adam_epsilon": 1e-4,  # an update is then proportional to its gradient, not to the gradient's sign
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    arguments = SPINConfig(output_dir=str(folder), **{**values, **settings})
    trainer = SPINTrainer(
        model=model or tiny("llama"),
        args=arguments,
        train_dataset=dataset(weights=weights, responses=arguments.loss.responses),
        processing_class=char_tokenizer(),
        reference_hash="opponent",
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def budget_of(trainer) -> int:
    return trainer.pair_forward.batcher.token_budget


def distance(one, other) -> float:
    """The relative distance of two trained models from where they started together."""
    start = dict(tiny("llama").named_parameters())
    moved, apart = 0.0, 0.0
    for (name, left), right in zip(one.named_parameters(), other.parameters(), strict=True):
        moved += (left - start[name]).pow(2).sum().item()
        apart += (left - right).pow(2).sum().item()
    return math.sqrt(apart / moved)


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    return run(tmp_path_factory.mktemp("padded"), batching="padded")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_tokens_per_batch": 60},
        {"share_prompts": False, "max_tokens_per_batch": 90},
        {"fused_head": False},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_tokens_per_batch": 60},
    ],
    ids=["default", "small budget", "unshared", "recomputed head", "checkpointing", "accumulation"],
)
def test_twenty_steps_follow_the_padded_trajectory(padded, tmp_path, settings):
    packed = run(tmp_path, **settings)
    assert losses(packed) == pytest.approx(losses(padded), abs=2e-5)
    assert losses(packed)[-1] < 0.6 < losses(packed)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert distance(packed.model, padded.model) < 1e-3
    for name in ("rewards/margins", "logps/chosen", "drift/chosen_per_token"):
        values = [[e[name] for e in trainer.state.log_history if name in e] for trainer in (packed, padded)]
        assert values[0] == pytest.approx(values[1], abs=1e-3), name


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_weighted_tokens_and_the_nll_term_follow_too(tmp_path, loss):
    settings = {"loss_type": loss, "nll_weight": 0.5, "weights": True, "max_steps": 5}
    packed, padded = (run(tmp_path / name, batching=name, **settings) for name in ("packed", "padded"))
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-4)
    assert distance(packed.model, padded.model) < 1e-3


def test_evaluation_is_the_mean_over_all_pairs(tmp_path):
    trainer = run(tmp_path, max_steps=3)
    trainer.eval_dataset = trainer.train_dataset
    results = []
    for size, budget in ((3, 50), (40, 10_000)):
        trainer.args.per_device_eval_batch_size = size
        batcher = MicroBatcher(trainer.pair_forward.batcher.collator, budget, 1)
        trainer.pair_forward = replace(trainer.pair_forward, batcher=batcher)
        results.append(trainer.evaluate())
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], abs=1e-6)
    assert results[0]["eval_rewards/margins"] == pytest.approx(results[1]["eval_rewards/margins"], abs=1e-6)


def test_a_model_that_reads_the_row_as_one_sequence_is_refused(tmp_path):
    model = tiny("llama")
    original = model.model.forward

    def forgetful(*args, position_ids=None, **kwargs):
        return original(*args, **kwargs)

    model.model.forward = forgetful
    with pytest.raises(InputError, match=r"LlamaForCausalLM gives different log-probs.*set batching: padded"):
        run(tmp_path, model)
    assert not list(tmp_path.glob("**/*.arrow"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batching": "pakced"}, "batching is 'pakced': choose one of packed, padded"),
        ({"packed_attention": "flash"}, "unknown packed_attention 'flash'"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch is 0"),
        ({"batching": "padded", "max_tokens_per_batch": 512}, "but batching is padded"),
        ({"optim": "lomo"}, "optim is lomo"),
        ({"torch_compile": True}, "torch_compile is true"),
    ],
)
def test_settings_are_checked(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        SPINConfig(output_dir=str(tmp_path), **settings)


def test_a_budget_below_the_longest_pair_is_refused_before_anything_is_written(tmp_path):
    row = {"prompt": "a" * 20, "response": "b"}
    pair = {
        "prompt_id": "0",
        "chosen": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "no"}],
    }
    (tmp_path / "train_prefs.jsonl").write_text(json.dumps(pair) + "\n")
    config = tmp_path / "c.yaml"
    values = {
        "model_name_or_path": str(save_tiny_model(tmp_path / "model")),
        "dataset_mixer": {str(tmp_path): 1.0},
        "dataset_splits": ["train_prefs"],
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
    }
    config.write_text(json.dumps(values))
    code, _, error = run_main(run_spin.main, config, "--max_tokens_per_batch=30")
    assert code == 2 and "pair 0 of train has 46 tokens" in error and "raise it to 46" in error
    assert not (tmp_path / "out").exists()


def test_a_killed_pass_over_the_opponent_goes_on_where_it_stopped(tmp_path, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(reference, "_PART_PAIRS", 4)
    data, key = dataset(20), ReferenceKey("w", "t", "float32")
    forward = PairForward.of(tiny_llama(VOCAB), 0, torch.device("cpu"), torch.float32, 1).packed(60, "sdpa")
    path = store_path(tmp_path, "train", key)
    passed: list[int] = []

    def compute(fail_after: int) -> None:
        def progress(done: int, total: int) -> None:
            passed.append(done)
            if done == fail_after:
                raise KeyboardInterrupt

        compute_reference(forward, data, path, key, Accelerator(cpu=True), progress)

    with pytest.raises(KeyboardInterrupt):
        compute(fail_after=5)
    assert not path.exists() and list(tmp_path.glob(".*part-*"))
    first = len(passed)
    compute(fail_after=0)
    second = len(passed) - first
    store = ReferenceLogps(path, key, data.rows)
    assert not list(tmp_path.glob(".*part-*"))
    whole = tmp_path / "whole"
    whole.mkdir()
    passed.clear()
    undisturbed = store_path(whole, "train", key)
    compute_reference(forward, data, undisturbed, key, Accelerator(cpu=True), lambda done, _: passed.append(done))
    assert second < len(passed)
    expected = ReferenceLogps(undisturbed, key, data.rows)
    for index in range(20):
        for one, other in zip(store[index], expected[index], strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_a_part_of_another_opponent_is_not_taken_up(tmp_path):
    from accelerate import Accelerator

    key = ReferenceKey("w", "t", "float32")
    path = store_path(tmp_path, "train", key)
    other, schema = ReferenceKey("other", "t", "float32"), reference._schema(("chosen", "rejected"))
    reference._write(path.with_name(f".{path.name}.part-0"), {0: [[1.0], [2.0]]}, other, schema)
    assert reference._missing(path, key, 3, Accelerator(cpu=True)).tolist() == [0, 1, 2]


def test_a_full_memory_ends_with_advice_and_the_run_goes_on_with_a_smaller_budget(tmp_path, monkeypatch):
    from spin.alignment.training import trainer as trainer_module

    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    undisturbed = run(tmp_path / "undisturbed", **settings)
    original, passed = trainer_module.batch_loss, []

    def full(model, batch, *rest):
        passed.append(batch)
        return original(model, batch, *rest) if len(passed) < 8 else torch.empty(2**55).sum()

    monkeypatch.setattr(trainer_module, "batch_loss", full)
    with pytest.raises(
        InputError, match=r"out of memory .*run again with --max_tokens_per_batch=\d+; .*last checkpoint"
    ):
        run(tmp_path / "run", **settings)
    monkeypatch.undo()
    arguments = {"max_tokens_per_batch": 60, **settings}
    resumed = run(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-5"), **arguments)
    assert resumed.steps_run == 5
    assert distance(resumed.model, undisturbed.model) < 1e-3


def test_a_resumed_training_keeps_its_automatic_budget(tmp_path, monkeypatch):
    from spin.alignment.training.memory import plan as memory_plan

    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    monkeypatch.setattr(memory_plan, "automatic_budget", lambda *_: 77)
    first = run(tmp_path, **{**settings, "max_steps": 5})
    monkeypatch.setattr(memory_plan, "automatic_budget", lambda *_: 99)
    second = run(tmp_path, resume=str(tmp_path / "checkpoint-5"), **settings)
    assert budget_of(first) == budget_of(second) == 77
    assert budget_of(run(tmp_path, max_steps=1)) == 99


def test_the_memory_is_estimated_before_training(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run(tmp_path, max_steps=1)
    said = caplog.text
    assert "max_tokens_per_batch: " in said and "peak memory of a process" in said and "activations" in said
