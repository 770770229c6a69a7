"""Online training: per step a batch of prompts, responses of the current policy, labels, pairs, one or more updates.

    accelerate launch --config_file configs/multi_gpu.yaml spin/run_online.py configs/online_dpo.yaml [--key=value ...]

Online DPO, online SPPO with rewards and online SPIN, by the keys ``pairing`` and ``loss_type``. The output folder is that of
run_spin.py; started again after a crash it goes on from the last complete checkpoint to the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from spin.alignment.core.key_tables import usage
from spin.alignment.core.program import is_help, run_program
from spin.alignment.data.config import DataConfig
from spin.alignment.models.config import ModelConfig
from spin.alignment.training.keys import OutputConfig, SPINKeys
from spin.alignment.training.online.keys import OnlineKeys
from spin.alignment.training.online.run import check_context, check_references, check_settings, train

USAGE = usage(
    "accelerate launch spin/run_online.py",
    "Trains a policy on labelled responses that it draws itself, step by step. CONFIG.yaml and --key=value hold these keys:",
    (ModelConfig, DataConfig, OnlineKeys, SPINKeys, OutputConfig),
    "and every key of transformers.TrainingArguments (batch sizes count prompts). docs/online.md tells more.",
)


def main(arguments: Sequence[str]) -> None:
    if is_help(arguments, USAGE):
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from spin.alignment.core.config import load_config

    values = load_config(arguments[0], arguments[1:])
    values.setdefault("dataset_splits", ["train"])
    from spin.alignment.core.provenance import hash_weights
    from spin.alignment.models.folder import model_folder
    from spin.alignment.training.online.config import OnlineConfig
    from spin.alignment.training.online.prompts import load_splits
    from spin.alignment.training.run import report, setup_logging
    from spin.alignment.training.settings import make_encoder, read_settings

    settings = read_settings(values, arguments[0], OnlineConfig)
    check_settings(settings)
    if settings.arguments.backend == "vllm":
        from spin.alignment.generation.vllm.backend import check_installed

        check_installed()
    setup_logging(settings.arguments.process_index == 0)
    model = settings.model
    encoder = make_encoder(settings)
    splits, left_out = load_splits(settings.data, settings.arguments, encoder)
    check_references(settings, splits)
    for name, dataset in splits.items():
        longer = f", {left_out[name]} longer than max_prompt_length left out" if left_out[name] else ""
        report(settings, f"{name}: {len(dataset)} prompts{longer}")
    folder = model_folder(model.model_name_or_path, model.model_revision)
    check_context(settings, splits, folder)
    train(settings, splits, left_out, encoder, hash_weights(folder))


if __name__ == "__main__":
    run_program(main)
