"""Step 2: preference parquet -> checkpoint, which is both the initial policy and the opponent of the next iteration.

    accelerate launch --config_file configs/multi_gpu.yaml spin/run_spin.py configs/config.yaml [--key=value ...]

Writes to ``output_dir``: the model (standalone), ``metrics.json``, ``inputs.json`` (what it was trained from) and the Trainer's
checkpoints. If it is started again after a crash, it resumes from the last complete checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.core.key_tables import usage
from spin.alignment.core.program import is_help, run_program
from spin.alignment.data.config import DataConfig
from spin.alignment.models.config import ModelConfig
from spin.alignment.training.keys import OutputConfig, SPINKeys

USAGE = usage(
    "accelerate launch spin/run_spin.py",
    "Trains a policy against its own earlier responses. CONFIG.yaml and --key=value accept these keys:",
    (ModelConfig, DataConfig, SPINKeys, OutputConfig),
    "and every key of transformers.TrainingArguments. See docs/configuration.md; configs/config.yaml is the paper's first "
    "iteration.",
)


def main(arguments: Sequence[str]) -> None:
    if is_help(arguments, USAGE):
        return
    from spin.alignment.core.config import load_config
    from spin.alignment.training.settings import check_declared

    values = load_config(arguments[0], arguments[1:])
    check_declared(values, arguments[0], SPINKeys)
    from spin.alignment.training.preference import PreferenceTraining
    from spin.alignment.training.run import train

    train(PreferenceTraining(), values, arguments[0])


if __name__ == "__main__":
    run_program(main)
