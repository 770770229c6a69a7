"""Step 2: preference parquet -> checkpoint, the policy of the next iteration and its opponent.

    accelerate launch --config_file configs/multi_gpu.yaml spin/run_spin.py configs/config.yaml [--key=value ...]

Writes into ``output_dir``: the model (loads by itself), ``metrics.json``, ``inputs.json`` (what it was trained from) and the
Trainer's checkpoints. Started again after a crash it resumes from the last complete checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from spin.alignment.core.errors import InputError
from spin.alignment.core.program import is_help, run_program
from spin.alignment.training.preference import train
from spin.alignment.training.preference_data import check_budget, largest, load_pairs

USAGE = """usage: accelerate launch spin/run_spin.py CONFIG.yaml [--key=value ...]

Trains a policy against its own earlier responses. CONFIG.yaml and --key=value hold

  model    model_name_or_path model_revision dtype attn_implementation trust_remote_code
           use_peft lora_r lora_alpha lora_target_modules load_in_4bit load_in_8bit
  data     dataset_mixer dataset_splits max_length max_prompt_length system preprocessing_num_workers
  method   loss_type beta eta alpha noise_ratio label_smoothing length_normalize nll_weight reverse reference_dir
  batches  batching max_tokens_per_batch share_prompts fused_head packed_attention
  output   output_dir overwrite_output_dir resume_from_checkpoint

and every key of transformers.TrainingArguments. docs/configuration.md explains each; configs/config.yaml is the paper's
first iteration."""


def main(arguments: Sequence[str]) -> None:
    if is_help(arguments, USAGE):
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from spin.alignment.core.config import load_config

    values = load_config(arguments[0], arguments[1:])
    from spin.alignment.core.provenance import hash_weights
    from spin.alignment.logprobs.position_kl import check_can_keep_opponent
    from spin.alignment.models.folder import check_fits, model_folder
    from spin.alignment.training.run import report, setup_logging
    from spin.alignment.training.settings import make_encoder, read_settings
    from spin.alignment.training.trainer import SPINConfig

    settings = read_settings(values, arguments[0], SPINConfig)
    if settings.model.init_from_config:
        raise InputError(
            "init_from_config has no meaning here (self-play needs a trained opponent): use spin/run_sft.py"
        )
    if settings.arguments.eval_strategy != "no" and not any(
        split.startswith("test") for split in settings.data.dataset_splits
    ):
        raise InputError(
            f"eval_strategy is {settings.arguments.eval_strategy}, but dataset_splits names no test split: add test_prefs to it"
        )
    check_can_keep_opponent(settings.arguments)
    setup_logging(settings.arguments.process_index == 0)
    model = settings.model
    encoder = make_encoder(settings)
    pairs, dropped = load_pairs(settings, encoder)
    for split, rows in pairs.items():
        reasons = "".join(f", {count} dropped: {reason}" for reason, count in dropped[split].items())
        report(settings, f"{split}: {len(rows)} pairs{reasons}")
    folder = model_folder(model.model_name_or_path, model.model_revision)
    check_fits(folder, *largest(pairs))
    check_budget(pairs, settings.arguments)
    key = hash_weights(folder)
    if model.load_in_4bit or model.load_in_8bit:
        key += "-4bit" if model.load_in_4bit else "-8bit"
    train(settings, pairs, dropped, encoder.tokenizer, key)


if __name__ == "__main__":
    run_program(main)
