"""Trains and evaluates with 1, 2 and 3 real processes (gloo, DDP) from one program: forked, so that the imports are paid once.

    python -m tests.helpers.in_processes MODEL FOLDER

writes ``FOLDER/KIND-PROCESSES-BATCH.json`` for every entry of :data:`RUNS`: the held-out metrics, the logs of the steps and the
trained weights of one tensor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

import spin
from spin.alignment.training.online.config import OnlineConfig
from spin.alignment.training.online.trainer import OnlineTrainer
from spin.alignment.training.sft import SFTArguments
from spin.alignment.training.sft_trainer import GroundTruthTrainer
from tests.helpers.forked import fork_group

# (processes, batch size per process and step, accumulation, evaluation batch): steps of 6 rows, of which 7 do not make a whole
# number; 5 held-out rows do not divide either.
ONE, TWO, THREE = (1, 6, 1, 5), (2, 3, 1, 2), (3, 1, 2, 1)
RUNS = {"pairs": (ONE, TWO, THREE), "sft": (ONE, TWO), "online": (ONE, THREE)}


def pair_rows(first: int, count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"say {n}", "chosen": f"word {n}" * (1 + n % 3), "rejected": "x" * (2 + 3 * (n % 4))}
        for n in range(first, first + count)
    ]


def arguments(folder: Path, accumulation: int, batch: int, eval_batch: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": eval_batch,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 1,
    }


def pairs_trainer(model: str, values: dict[str, Any]) -> Any:
    config = spin.SPINConfig(**values, max_length=128, max_prompt_length=64, optim="adamw_torch")
    return spin.SPINTrainer(
        model, config, Dataset.from_list(pair_rows(0, 7)), eval_dataset=Dataset.from_list(pair_rows(50, 5))
    )


def sft_trainer(model: str, values: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def rows(first: int, count: int) -> Dataset:
        ids = [list(range(10, 13 + n)) for n in range(first % 9, first % 9 + count)]
        return Dataset.from_list([{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids])

    return GroundTruthTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=SFTArguments(**values, label_smoothing_factor=0.1),
        train_dataset=rows(0, 7),
        eval_dataset=rows(50, 5),
        processing_class=AutoTokenizer.from_pretrained(model),
    )


def online_trainer(model: str, values: dict[str, Any]) -> Any:
    config = OnlineConfig(
        **values,
        max_length=96,
        max_prompt_length=64,
        optim="adamw_torch",
        num_samples=3,
        max_new_tokens=6,
        scorer="tests.helpers.online:share_of_letters",
        eval_temperatures=[0.0, 1.0],
    )
    prompts = [Dataset.from_list([{"prompt": row["prompt"]} for row in pair_rows(*some)]) for some in ((0, 7), (50, 5))]
    return OnlineTrainer(model, config, *prompts)


TRAINERS: dict[str, Callable[[str, dict[str, Any]], Any]] = {
    "pairs": pairs_trainer,
    "sft": sft_trainer,
    "online": online_trainer,
}


def train_one(kind: str, model: str, folder: Path, run: tuple[int, int, int, int]) -> None:
    """Train for one epoch, evaluate, and write what must not depend on ``run``."""
    processes, batch, accumulation, eval_batch = run
    own = folder / f"{kind}-{processes}-{eval_batch}"
    trainer = TRAINERS[kind](model, arguments(own, accumulation, batch, eval_batch))
    trainer.train()
    held_out = trainer.evaluate()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = trainer.accelerator.unwrap_model(trainer.model_wrapped).state_dict()["model.layers.1.mlp.up_proj.weight"]
    if trainer.accelerator.is_main_process:
        timed = ("runtime", "per_second", "seconds", "num_tokens", "grad_norm", "epoch")
        record = {
            "held_out": {name: value for name, value in held_out.items() if not any(word in name for word in timed)},
            "steps": [
                {name: value for name, value in entry.items() if not any(word in name for word in timed)}
                for entry in steps
            ],
            "weights": weights.flatten()[:64].tolist(),
        }
        own.with_suffix(".json").write_text(json.dumps(record))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    for name in sys.argv[3:] or TRAINERS:
        for run_ in RUNS[name]:
            fork_group(run_[0], partial(train_one, name, sys.argv[1], Path(sys.argv[2]), run_))
