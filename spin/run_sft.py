"""The SFT start, and the continued-SFT control: thin over TRL's SFTTrainer, same data, prompts and truncation as SPIN.

    accelerate launch spin/run_sft.py CONFIG.yaml [--key=value ...]

Only response tokens are learned. ``init_from_config: true`` starts from random weights. The output folder is that of run_spin.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from spin.alignment.core.key_tables import usage
from spin.alignment.core.program import is_help, run_program
from spin.alignment.data.config import DataConfig
from spin.alignment.models.config import ModelConfig
from spin.alignment.training.keys import OutputConfig, SFTKeys
from spin.alignment.training.sft_data import load_truth
from spin.alignment.training.sft_run import train

USAGE = usage(
    "accelerate launch spin/run_sft.py",
    "Fine-tunes on the ground truth. CONFIG.yaml and --key=value hold these keys:",
    (ModelConfig, DataConfig, SFTKeys, OutputConfig),
    "and every key of trl.SFTConfig. docs/configuration.md tells more.",
)


def main(arguments: Sequence[str]) -> None:
    if is_help(arguments, USAGE):
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from spin.alignment.core.config import load_config

    values = load_config(arguments[0], arguments[1:])
    from spin.alignment.core.provenance import hash_file, hash_weights
    from spin.alignment.models.folder import model_folder
    from spin.alignment.training.run import report, setup_logging
    from spin.alignment.training.settings import make_encoder, read_settings
    from spin.alignment.training.sft import SFTArguments

    values.setdefault("dataset_splits", ["train"])
    settings = read_settings(values, arguments[0], SFTArguments)
    setup_logging(settings.arguments.process_index == 0)
    model = settings.model
    encoder = make_encoder(settings)
    data, dropped = load_truth(settings, encoder)
    for split, rows in data.items():
        report(
            settings, f"{split}: {len(rows)} rows" + (f", dropped {dropped}" if dropped and split == "train" else "")
        )
    source = model_folder(model.model_name_or_path, model.model_revision)
    key = hash_file(source / "config.json") if model.init_from_config else hash_weights(source)
    train(settings, data, dropped, encoder.tokenizer, key)


if __name__ == "__main__":
    run_program(main)
