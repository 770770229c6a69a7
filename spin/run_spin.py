"""Step 2: preference parquet -> checkpoint, the policy of the next iteration and its opponent.

    accelerate launch --config_file configs/multi_gpu.yaml spin/run_spin.py configs/config.yaml [--key=value ...]

Writes into ``output_dir``: the model (loads by itself), ``metrics.json``, ``inputs.json`` (what it was trained from) and the
Trainer's checkpoints. Started again after a crash it resumes from the last complete checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.core.program import is_help, run_program

USAGE = """usage: accelerate launch spin/run_spin.py CONFIG.yaml [--key=value ...]

Trains a policy against its own earlier responses. CONFIG.yaml and --key=value hold

  model    model_name_or_path model_revision dtype attn_implementation trust_remote_code
           use_peft lora_r lora_alpha lora_target_modules load_in_4bit load_in_8bit
  data     dataset_mixer dataset_splits max_length max_prompt_length system preprocessing_num_workers
  method   loss_type loss_settings beta eta alpha noise_ratio label_smoothing length_normalize nll_weight reverse
           reference_dir
  batches  batching max_tokens_per_batch share_prompts fused_head packed_attention
  output   output_dir overwrite_output_dir resume_from_checkpoint

and every key of transformers.TrainingArguments. docs/configuration.md explains each; configs/config.yaml is the paper's
first iteration."""


def main(arguments: Sequence[str]) -> None:
    if is_help(arguments, USAGE):
        return
    from spin.alignment.core.config import load_config

    values = load_config(arguments[0], arguments[1:])
    from spin.alignment.training.preference import PreferenceTraining
    from spin.alignment.training.run import train

    train(PreferenceTraining(), values, arguments[0])


if __name__ == "__main__":
    run_program(main)
