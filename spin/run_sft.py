"""The SFT start, and the continued-SFT control: thin over TRL's SFTTrainer, same data, prompts and truncation as SPIN.

    accelerate launch spin/run_sft.py CONFIG.yaml [--key=value ...]

Only response tokens are learned. ``init_from_config: true`` starts from random weights. The output folder is that of run_spin.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.core.program import is_help, run_program

USAGE = """usage: accelerate launch spin/run_sft.py CONFIG.yaml [--key=value ...]

Fine-tunes on the ground truth. CONFIG.yaml and --key=value hold

  model    model_name_or_path model_revision dtype attn_implementation trust_remote_code init_from_config
           use_peft lora_r lora_alpha lora_target_modules load_in_4bit load_in_8bit
  data     dataset_mixer dataset_splits max_length max_prompt_length system preprocessing_num_workers
  output   output_dir overwrite_output_dir resume_from_checkpoint

and every key of trl.SFTConfig. docs/configuration.md explains each."""


def main(arguments: Sequence[str]) -> None:
    if is_help(arguments, USAGE):
        return
    from spin.alignment.core.config import load_config

    values = load_config(arguments[0], arguments[1:])
    from spin.alignment.training.run import train
    from spin.alignment.training.sft import SFTTraining

    train(SFTTraining(), values, arguments[0])


if __name__ == "__main__":
    run_program(main)
