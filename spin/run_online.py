"""Online training: per step a batch of prompts, responses of the current policy, labels, pairs, one or more updates.

    accelerate launch --config_file configs/multi_gpu.yaml spin/run_online.py configs/online_dpo.yaml [--key=value ...]

Online DPO, online SPPO with rewards and online SPIN, by the keys ``pairing`` and ``loss_type``. The output folder is that of
run_spin.py; started again after a crash it goes on from the last complete checkpoint to the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.core.program import is_help, run_program

USAGE = """usage: accelerate launch spin/run_online.py CONFIG.yaml [--key=value ...]

Trains a policy on labelled responses that it draws itself, step by step. CONFIG.yaml and --key=value hold

  model     model_name_or_path model_revision dtype attn_implementation trust_remote_code
            use_peft lora_r lora_alpha lora_target_modules
  data      dataset_mixer dataset_splits max_length max_prompt_length system
  sampling  backend num_samples temperature top_p top_k max_new_tokens generation_batch_size gpu_memory_utilization
  labels    scorer scorer_model scorer_batch_size scorer_max_length scorer_dtype base_url score_cache
            pairing baseline soft_mean_b
  method    loss_type loss_settings beta eta label_smoothing length_normalize nll_weight updates_per_batch ref_update_freq
  held out  eval_prompts eval_split eval_strategy eval_steps eval_temperatures eval_limit
  output    output_dir overwrite_output_dir resume_from_checkpoint

and every key of transformers.TrainingArguments (batch sizes count prompts). docs/online.md explains each."""


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
