"""SFT as contenders: this project's trainer, and TRL's SFTTrainer with its defaults and with its best settings on the machine."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks import matmul
from benchmarks.contender import Contender

if TYPE_CHECKING:
    from benchmarks.harness import Job, Turns


def run_ours(job: Job, turns: Turns, **settings: Any) -> None:
    """Train with GroundTruthTrainer; ``settings`` are keys of SFTArguments that differ from the defaults."""
    from spin.alignment.training.sft_config import SFTArguments
    from spin.alignment.training.sft_trainer import GroundTruthTrainer

    _train(GroundTruthTrainer, SFTArguments, job, turns, settings)


def run_trl(job: Job, turns: Turns, **settings: Any) -> None:
    """Train with TRL's SFTTrainer; ``settings`` are keys of SFTConfig that differ from the defaults."""
    from trl import SFTConfig, SFTTrainer

    _train(SFTTrainer, SFTConfig, job, turns, {"dataset_kwargs": {"skip_prepare_dataset": True}} | settings)


def _train(trainer_class: Any, config_class: Any, job: Job, turns: Turns, settings: dict[str, Any]) -> None:
    from datasets import Dataset

    from benchmarks.shapes import load_model, make_tokenizer
    from benchmarks.training import TurnCallback, common_arguments

    model = load_model(job.model_folder)
    turns.baseline()
    arguments = {name: value for name, value in common_arguments(job).items() if name != "beta"}
    rows = [
        {
            "input_ids": row["prompt_ids"] + row["response_ids"],
            "labels": [-100] * len(row["prompt_ids"]) + row["response_ids"],
        }
        for row in job.rows()
    ]
    trainer = trainer_class(
        model=model,
        args=config_class(**arguments | settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(model.config.vocab_size),
        callbacks=[TurnCallback(job, turns, reference_on_train_begin=False, records={"loss": "loss"})],
    )
    turns.ready()
    trainer.train()


_BEST = {"gradient_checkpointing": False}
SFT_CONTENDERS = {
    "ours": Contender("this project", run_ours),
    "padded": Contender("ours, padded batches", partial(run_ours, batching="padded")),
    "trl_default": Contender("TRL, defaults", run_trl),
    "trl_best": Contender("TRL, activations kept", partial(run_trl, **_BEST)),
    "trl_best_grouped": Contender("TRL, kept + length groups", partial(run_trl, **_BEST), grouped=True),
    "trl_padding_free": Contender(
        "TRL, kept + padding-free", partial(run_trl, **_BEST, padding_free=True, max_length=None)
    ),
    matmul.NAME: Contender("matrix products", matmul.run),
}
