"""The data of the studies, made from the public data sets: disjoint parts for training, for stopping and for measuring."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.evidence.plan import DATA
from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError
from spin.alignment.data.reformat import ReformatConfig, reformat

HELD_OUT_ROWS, STOPPING_ROWS = 200, 86
SPIN_PROMPTS, GSM8K_ROWS, GSM8K_PROMPTS = 448, 1000, 4000


def prepare(source: Path) -> None:
    """Write the parts under ``runs/evidence/data``; those that are there are kept.

    Args:
        source: the folder with ``alpaca_demo``, ``gsm8k`` and ``ifeval`` as published.

    Raises:
        InputError: a data set is missing or damaged.
    """
    for name in ("alpaca_demo", "gsm8k", "ifeval/input_data.jsonl"):
        if not (source / name).exists():
            raise InputError(f"{source / name} does not exist: put the public data set there, or pass --data")
    # 985 different rows: 200 to measure on, 86 to stop by, 699 to train on, of which SPIN plays with 448.
    _part(source / "alpaca_demo", "alpaca", test_size=HELD_OUT_ROWS)
    _part(DATA / "alpaca" / "train.parquet", "alpaca_sft", test_size=STOPPING_ROWS)
    _part(DATA / "alpaca_sft" / "train.parquet", "alpaca_spin", subset=SPIN_PROMPTS)
    _part(source / "gsm8k", "gsm8k", split="test")
    _part(source / "gsm8k", "gsm8k_sft", test_size=STOPPING_ROWS, subset=GSM8K_ROWS)
    _part(source / "gsm8k", "gsm8k_prompts", test_size=STOPPING_ROWS, subset=GSM8K_PROMPTS)
    ifeval = DATA / "ifeval" / "test.jsonl"
    ifeval.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "ifeval" / "input_data.jsonl", ifeval)
    say(f"the data of the studies is in {DATA}")


def _part(source: Path, name: str, split: str = "train", test_size: int = 0, subset: int = 0) -> None:
    reformat(
        ReformatConfig(
            data=str(source), output_dir=str(DATA / name), split=split, test_size=test_size, subset=subset, seed=42
        )
    )
