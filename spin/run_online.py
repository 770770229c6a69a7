"""Online training: each step samples responses to a batch of prompts, labels and pairs them, and makes one or more updates.

    accelerate launch --config_file configs/multi_gpu.yaml spin/run_online.py configs/online_gsm8k.yaml [--key=value ...]

``pairing`` and ``loss_type`` select online DPO, online SPPO with rewards or online SPIN. The output is as in run_spin.py. When
started again after a crash, it resumes from the last complete checkpoint and reproduces the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.core.key_tables import usage
from spin.alignment.core.program import is_help, run_program
from spin.alignment.data.config import DataConfig
from spin.alignment.models.config import ModelConfig
from spin.alignment.training.keys import OutputConfig, SPINKeys
from spin.alignment.training.online.keys import OnlineKeys

USAGE = usage(
    "accelerate launch spin/run_online.py",
    "Trains a policy on its own responses, sampled and labelled step by step. CONFIG.yaml and --key=value accept these keys:",
    (ModelConfig, DataConfig, OnlineKeys, SPINKeys, OutputConfig),
    "and every key of transformers.TrainingArguments (batch sizes count prompts). See docs/online.md.",
)


def main(arguments: Sequence[str]) -> None:
    if is_help(arguments, USAGE):
        return
    from spin.alignment.core.config import load_config
    from spin.alignment.training.settings import check_declared

    values = load_config(arguments[0], arguments[1:])
    check_declared(values, arguments[0], OnlineKeys, SPINKeys)
    from spin.alignment.training.online.run import OnlineTraining
    from spin.alignment.training.run import train

    train(OnlineTraining(), values, arguments[0])


if __name__ == "__main__":
    run_program(main)
