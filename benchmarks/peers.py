"""The peers: the semantics of uclaml/SPIN in plain PyTorch, and TRL's DPOTrainer with its defaults and with its best settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.harness import Job, Turns


def run_naive(job: Job, turns: Turns) -> None:
    """Train as uclaml/SPIN does: two models in memory, a padded block of chosen and rejected, logits of all positions in
    float32, log-softmax and gather, a forward pass of the reference in every step.
    """
    import torch

    from benchmarks.shapes import load_model

    policy = load_model(job.model_folder, job.weights).to(job.device)
    turns.baseline()
    opponent = load_model(job.model_folder, job.weights).to(job.device).eval().requires_grad_(False)
    optimizer = _torch_optimizer(policy, job)
    rows = job.rows()
    turns.ready()
    turns.begin()
    turns.end()  # no reference pass before training
    policy.train()
    step = 0
    for end in job.turn_ends:
        turns.begin()
        while step < end:
            batch = _naive_batch(rows[step * job.batch_size : (step + 1) * job.batch_size], job.device)
            with torch.autocast(job.device, torch.bfloat16, enabled=job.precision == "bf16"):
                chosen, rejected = _naive_logps(policy, batch).chunk(2)
                with torch.no_grad():
                    chosen_start, rejected_start = _naive_logps(opponent, batch).chunk(2)
            margin = job.beta * ((chosen - rejected) - (chosen_start - rejected_start))
            loss = -torch.nn.functional.logsigmoid(margin).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            values = {"loss": loss, "chosen": chosen.mean(), "rejected": rejected.mean()}
            turns.records.append({name: value.item() for name, value in values.items()})
            step += 1
        turns.end()


def _torch_optimizer(model: Any, job: Job) -> Any:
    import torch

    if job.optimizer == "rmsprop":
        return torch.optim.RMSprop(model.parameters(), lr=job.learning_rate)
    return torch.optim.AdamW(model.parameters(), lr=job.learning_rate, weight_decay=0.0)


def _naive_batch(rows: list[dict[str, list[int]]], device: str) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and response_mask of shape ``(2B, T)``, padded on the right."""
    import torch

    from benchmarks.shapes import PAD_ID

    whole = [(row["prompt_ids"], row[half]) for half in ("chosen_ids", "rejected_ids") for row in rows]
    width = max(len(prompt) + len(response) for prompt, response in whole)
    input_ids = torch.full((len(whole), width), PAD_ID)
    attention_mask, response_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for number, (prompt, response) in enumerate(whole):
        end = len(prompt) + len(response)
        input_ids[number, :end] = torch.tensor(prompt + response)
        attention_mask[number, :end] = 1
        response_mask[number, len(prompt) : end] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}
    return {name: value.to(device) for name, value in batch.items()}


def _naive_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the summed log-probs of the responses in nats, of shape ``(2B,)``."""
    import torch

    ids, mask = batch["input_ids"][:, 1:], batch["response_mask"][:, 1:]
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logits = logits.to(torch.float32)[:, :-1]
    each = logits.log_softmax(dim=-1).gather(dim=2, index=ids.unsqueeze(2)).squeeze(2)
    return (each * mask).sum(dim=-1)


def run_trl_default(job: Job, turns: Turns) -> None:
    """Train with TRL's DPOTrainer with its defaults: activations recomputed, a reference model run in every step."""
    trainer = _trl_trainer(job, turns, {})
    turns.ready()
    turns.begin()
    turns.end()  # no reference pass before training
    trainer.train()


def run_trl_best(job: Job, turns: Turns) -> None:
    """Train with TRL's DPOTrainer with its fastest settings: reference log-probs computed once, activations kept."""
    trainer = _trl_trainer(job, turns, {"precompute_ref_log_probs": True, "gradient_checkpointing": False})
    trainer.train()


def _trl_trainer(job: Job, turns: Turns, settings: dict[str, Any]) -> Any:
    """Return a DPOTrainer. If log-probs are precomputed, that pass is the first turn and happens here."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from benchmarks.shapes import as_text, load_model, make_tokenizer
    from benchmarks.training import TurnCallback, common_arguments

    class TurnTakingTrainer(DPOTrainer):
        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            turns.ready()
            turns.begin()
            dataset = super()._precompute_ref_logps(*arguments)
            turns.end()
            return dataset

    model = load_model(job.model_folder, job.weights)
    turns.baseline()
    rows = job.rows()
    names = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    texts = Dataset.from_list([{name: as_text(row[ids]) for name, ids in names.items()} for row in rows])
    trainer = TurnTakingTrainer(
        model=model,
        args=DPOConfig(**common_arguments(job), max_length=job.max_length, **settings),
        train_dataset=texts,
        processing_class=make_tokenizer(model.config.vocab_size),
        callbacks=[TurnCallback(job, turns, reference_on_train_begin=False)],
    )
    for ids in names.values():
        if list(trainer.train_dataset[ids]) != [row[ids] for row in rows]:
            raise SystemExit(f"TRL trains on {ids} that differ from those of the benchmark")
    return trainer
