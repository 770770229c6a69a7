"""Online training: per step a batch of prompts, responses of the current policy, labels, pairs, one or more updates.

    accelerate launch --config_file configs/multi_gpu.yaml spin/run_online.py configs/online_dpo.yaml [--key=value ...]

Online DPO, online SPPO with rewards and online SPIN, by the keys ``pairing`` and ``loss_type``. The output folder is that of
run_spin.py; started again after a crash it goes on from the last complete checkpoint to the same numbers.
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
    "Trains a policy on labelled responses that it draws itself, step by step. CONFIG.yaml and --key=value hold these keys:",
    (ModelConfig, DataConfig, OnlineKeys, SPINKeys, OutputConfig),
    "and every key of transformers.TrainingArguments (batch sizes count prompts). docs/online.md tells more.",
)


def main(arguments: Sequence[str]) -> None:
    if is_help(arguments, USAGE):
        return
    from spin.alignment.core.config import load_config

    values = load_config(arguments[0], arguments[1:])
    from spin.alignment.training.online.run import OnlineTraining
    from spin.alignment.training.run import train

    train(OnlineTraining(), values, arguments[0])


if __name__ == "__main__":
    run_program(main)
