"""SFT on packed rows against TRL's SFTTrainer on padded ones: the same losses, gradients, metrics and weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin.alignment.training.sft_config import SFTArguments
from spin.alignment.training.sft_trainer import GroundTruthTrainer

ROWS = 7


def conversations(vocab_size: int, count: int = ROWS, seed: int = 0) -> Dataset:
    """Sequences of 9 to 40 tokens: user turns (label -100) and answers take turns, and one row begins with an answer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    rows = []
    for number in range(count):
        ids, labels = [], []
        for turn in range(2 + number % 3):
            words = [draw(5, vocab_size) for _ in range(draw(3, 11))]
            ids += words
            labels += words if (turn + (number == 3)) % 2 else [-100] * len(words)
        rows.append({"input_ids": ids, "labels": labels})
    return Dataset.from_list(rows)


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-3,
        "optim": "adamw_torch",
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 1,
        **settings,
    }


def recorded(trainer_class: type) -> type:
    """A trainer that keeps the gradient of every optimiser step, before clipping."""

    class Recorded(trainer_class):  # type: ignore[misc, valid-type]
        def _clip_grad_norm(self, model: Any) -> Any:
            gradient = [weight.grad.flatten().clone() for weight in model.parameters() if weight.grad is not None]
            self.__dict__.setdefault("gradients", []).append(torch.cat(gradient))
            return super()._clip_grad_norm(model)

    return Recorded


def train(trainer_class: type, args: Any, model: Path, rows: Dataset, held_out: Any, dtype: torch.dtype) -> Any:
    trainer = recorded(trainer_class)(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
        args=args,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return trainer


def train_with_trl(folder: Path, model: Path, rows: Dataset, held_out: Dataset | None = None, **settings: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**arguments(folder, **settings), dataset_kwargs={"skip_prepare_dataset": True})
    return train(SFTTrainer, args, model, rows, held_out, torch.float32)


def train_here(
    folder: Path,
    model: Path,
    rows: Dataset,
    held_out: Dataset | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Any:
    return train(GroundTruthTrainer, SFTArguments(**arguments(folder, **settings)), model, rows, held_out, dtype)


def assert_same_steps(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Losses and metrics of every step, its gradient (relative to the gradient's norm), and the trained weights."""
    assert len(ours.gradients) == len(theirs.gradients) > 1
    for mine, other in zip(ours.gradients, theirs.gradients, strict=True):
        assert (mine - other).norm() <= tolerance * other.norm()
    logs = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, theirs)]
    for mine, other in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "num_tokens", "learning_rate", "epoch"):
            assert mine[name] == pytest.approx(other[name], rel=tolerance), name
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing_factor": 0.1},
    "dft": {"loss_type": "dft"},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_is_that_of_trl(tiny_model, tmp_path, name):
    rows = conversations(40)
    theirs = train_with_trl(tmp_path, tiny_model, rows, **SETTINGS[name])
    for own in ({"max_tokens_per_batch": 64}, {"batching": "padded"}):  # two or three rows in a micro-batch, or all
        ours = train_here(tmp_path, tiny_model, rows, **SETTINGS[name], **own)
        assert ours.pair_forward.kernel == (None if "batching" in own else "sdpa")
        assert_same_steps(ours, theirs)


def test_entropy_accuracy_and_held_out_means_are_those_of_trl(tiny_model, tmp_path):
    """One batch each, where TRL's mean over batches is a mean over tokens."""
    rows, held_out = conversations(40), conversations(40, 5, seed=3)
    settings = {"per_device_train_batch_size": ROWS, "per_device_eval_batch_size": 5, "num_train_epochs": 2}
    ours, theirs = (run(tmp_path, tiny_model, rows, held_out, **settings) for run in (train_here, train_with_trl))
    steps = [[entry for entry in each.state.log_history if "loss" in entry] for each in (ours, theirs)]
    for mine, other in zip(*steps, strict=True):
        assert mine["entropy"] == pytest.approx(other["entropy"], rel=1e-5)
        assert mine["mean_token_accuracy"] == pytest.approx(other["mean_token_accuracy"], abs=1e-7)
    found, wanted = ours.evaluate(), theirs.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5), name


def test_the_loss_is_that_of_a_plain_forward_pass(tiny_model, tmp_path):
    rows = conversations(40)
    ours = train_here(tmp_path, tiny_model, rows, per_device_train_batch_size=ROWS, learning_rate=1e-9, max_steps=2)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    losses = []
    for row in rows:
        with torch.no_grad():
            logps = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        labels = torch.tensor(row["labels"][1:])
        losses.append(-logps.gather(1, labels.clamp(min=0)[:, None])[:, 0][labels != -100])
    first, *_ = (entry["loss"] for entry in ours.state.log_history if "loss" in entry)
    assert first == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_any_packing_gives_the_same_gradient(tiny_model, tmp_path):
    rows = conversations(40)
    runs = [
        train_here(tmp_path, tiny_model, rows, dtype=torch.float64, label_smoothing_factor=0.2, **settings)
        for settings in ({"max_tokens_per_batch": 40}, {"max_tokens_per_batch": 1000}, {"batching": "padded"})
    ]
    for other in runs[1:]:
        for mine, theirs in zip(runs[0].gradients, other.gradients, strict=True):
            assert (mine - theirs).norm() <= 1e-9 * theirs.norm()


def test_a_head_that_is_not_a_matrix_gives_the_same_metrics(tiny_model, tmp_path):
    """It recomputes its logits in the backward pass, which must not be counted again."""

    class Head(torch.nn.Linear):
        pass

    rows, runs = conversations(40), []
    for fused in (True, False):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        if not fused:
            model.get_output_embeddings().__class__ = Head
        args = SFTArguments(**arguments(tmp_path, label_smoothing_factor=0.1))
        trainer = GroundTruthTrainer(model, args, rows, processing_class=AutoTokenizer.from_pretrained(tiny_model))
        assert trainer.pair_forward.fused_head is fused
        trainer.train()
        runs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for mine, other in zip(*runs, strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-5)


def test_log_probs_of_smoothed_targets_by_hand():
    from spin.alignment.logprobs.head import LogitTransform
    from spin.alignment.logprobs.target_reader import TargetReader

    logits = torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0)]])  # probabilities 1/8, 2/8, 5/8
    reader = TargetReader(0.3)
    slopes = logits.clone()
    found = reader.logps_and_slopes(slopes, torch.tensor([1]), LogitTransform())
    # q = 0.1, 0.8, 0.1
    wanted = 0.1 * math.log(1 / 8) + 0.8 * math.log(2 / 8) + 0.1 * math.log(5 / 8)
    assert found.item() == pytest.approx(wanted)
    assert slopes[0].tolist() == pytest.approx([1 / 8 - 0.1, 2 / 8 - 0.8, 5 / 8 - 0.1])
    entropy, correct = reader.take()
    assert entropy.item() == pytest.approx(-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8)))
    assert correct.item() == 0
    capped = LogitTransform(scale=0.5, softcap=2.0)
    leaf = logits.clone().requires_grad_()
    again = TargetReader(0.3)
    again.logps_of(leaf, torch.tensor([2]), capped).sum().backward()
    slopes = logits.clone()
    TargetReader(0.3).logps_and_slopes(slopes, torch.tensor([2]), capped)
    torch.testing.assert_close(slopes, -leaf.grad)
    assert again.take()[1].item() == 1


REFUSED = [
    ({"padding_free": True}, "padding_free is True, but run_sft.py packs rows itself"),
    ({"packing_strategy": "wrapped"}, "packing_strategy is 'wrapped', but run_sft.py packs rows itself"),
    ({"pad_to_multiple_of": 8}, "pad_to_multiple_of is 8"),
    ({"auto_find_batch_size": True}, "micro-batches are sized by tokens"),
    ({"bf16_full_eval": True}, "bf16_full_eval is True, but the weights would be rounded"),
    ({"include_num_input_tokens_seen": "all"}, "num_tokens in the log counts them"),
    ({"router_aux_loss_coef": 0.01}, "load-balancing loss"),
    ({"shuffle_dataset": True}, "shuffle_dataset is True, but run_sft.py loads the model and encodes the rows"),
    ({"chat_template_path": "x.jinja"}, "chat_template_path"),
    ({"truncation_mode": "keep_end"}, "truncation_mode"),
    ({"neftune_noise_alpha": 5.0}, "set batching: padded"),
    ({"torch_compile": True}, "set batching: padded"),
    ({"max_tokens_per_batch": 64, "batching": "padded"}, "batching is padded: remove it"),
    ({"loss_type": "dft", "label_smoothing_factor": 0.1}, "loss_type dft weighs each token"),
    ({"activation_offloading": True}, "no GPU to move activations from"),
    ({"optim": "lomo"}, "updates weights during the backward pass"),
    ({"packed_attention": "fast"}, "packed_attention"),
]


@pytest.mark.parametrize(("settings", "said"), REFUSED)
def test_keys_that_have_no_meaning_here_are_refused(tmp_path, settings, said):
    from spin.alignment.core.errors import InputError

    with pytest.raises(InputError) as caught:
        SFTArguments(**arguments(tmp_path, **settings))
    assert said in str(caught.value)


def test_noise_on_embeddings_trains_on_padded_rows(tiny_model, tmp_path):
    rows = conversations(40)
    quiet, noisy = (
        train_here(tmp_path, tiny_model, rows, batching="padded", neftune_noise_alpha=alpha) for alpha in (None, 5.0)
    )
    assert not torch.allclose(quiet.gradients[0], noisy.gradients[0])


def test_a_row_without_a_label_is_read_but_counts_nowhere(tiny_model, tmp_path):
    rows = conversations(40)
    silent = {"input_ids": [7, 8, 9], "labels": [-100] * 3}
    more = Dataset.from_list([*rows, silent])
    settings = {
        "per_device_train_batch_size": ROWS + 1,
        "max_tokens_per_batch": 40,
        "train_sampling_strategy": "sequential",
    }
    ours = train_here(tmp_path, tiny_model, more, max_steps=2, **settings)
    theirs = train_with_trl(
        tmp_path,
        tiny_model,
        more,
        max_steps=2,
        per_device_train_batch_size=ROWS + 1,
        train_sampling_strategy="sequential",
    )
    assert_same_steps(ours, theirs)


def test_smollm2_learns_a_conversation_as_with_trl(smollm2, tmp_path):
    """Real rows: the model's own template, both answers of a conversation, smoothing, and two micro-batches."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    talks = [
        ("Name a colour.", "Red.", "And a fruit?", "An apple, for example."),
        ("Count to three.", "1, 2, 3", "Why?", "You asked."),
    ]
    rows = []
    for first, answer, second, last in talks:
        turns = [("user", first), ("assistant", answer), ("user", second), ("assistant", last)]
        ids: list[int] = []
        labels: list[int] = []
        for end, (role, _) in enumerate(turns, start=1):
            some = [{"role": name, "content": text} for name, text in turns[:end]]
            text = tokenizer.apply_chat_template(some, tokenize=False)
            more = tokenizer(text, add_special_tokens=False)["input_ids"][len(ids) :]
            labels += more if role == "assistant" else [-100] * len(more)
            ids += more
        rows.append({"input_ids": ids, "labels": labels})
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "optim": "sgd", "label_smoothing_factor": 0.1}
    data = Dataset.from_list(rows)
    theirs = train_with_trl(tmp_path, smollm2, data, **settings)
    wanted, loss = theirs.gradients[0], theirs.state.log_history[0]["loss"]
    del theirs
    ours = train_here(
        tmp_path, smollm2, data, max_tokens_per_batch=max(len(row["input_ids"]) for row in rows), **settings
    )
    assert ours.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert (ours.gradients[0] - wanted).norm() <= 1e-5 * wanted.norm()
