"""Online training: per step a batch of prompts, responses of the current policy, labels, pairs, one or more updates.

    accelerate launch --config_file configs/multi_gpu.yaml spin/run_online.py configs/online_dpo.yaml [--key=value ...]

Online DPO, online SPPO with rewards and online SPIN, by the keys ``pairing`` and ``loss_type``. The output folder is that of
run_spin.py; started again after a crash it goes on from the last complete checkpoint to the same numbers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.errors import InputError
from spin.programs import is_help, run_program

if TYPE_CHECKING:
    from spin.alignment.chat import ChatEncoder
    from spin.alignment.online.prompts import PromptDataset
    from spin.alignment.online.samplers import PolicySampler
    from spin.alignment.online.trainer import OnlineTrainer
    from spin.alignment.training_run import Settings

USAGE = """usage: accelerate launch spin/run_online.py CONFIG.yaml [--key=value ...]

Trains a policy on labelled responses that it draws itself, step by step. CONFIG.yaml and --key=value hold

  model     model_name_or_path model_revision dtype attn_implementation trust_remote_code
            use_peft lora_r lora_alpha lora_target_modules
  data      dataset_mixer dataset_splits max_length max_prompt_length system
  sampling  backend num_samples temperature top_p top_k max_new_tokens generation_batch_size gpu_memory_utilization
  labels    scorer scorer_model scorer_batch_size scorer_max_length scorer_dtype base_url score_cache
            pairing baseline soft_mean_b
  method    loss_type beta eta label_smoothing length_normalize nll_weight updates_per_batch ref_update_freq
  held out  eval_prompts eval_split eval_strategy eval_steps eval_temperatures eval_limit
  output    output_dir overwrite_output_dir resume_from_checkpoint

and every key of transformers.TrainingArguments (batch sizes count prompts). docs/online.md explains each."""


def check_settings(settings: Settings) -> None:
    """Check what needs no model: the scorer, and settings that do not go together.

    Raises:
        InputError: naming the key and the mend.
    """
    from spin.alignment.scoring import check_scorer

    arguments, model, data = settings.arguments, settings.model, settings.data
    if model.init_from_config:
        raise InputError(
            "init_from_config has no meaning here (a policy without training says nothing): use run_sft.py"
        )
    if model.load_in_4bit or model.load_in_8bit:
        raise InputError(
            "load_in_4bit and load_in_8bit do not work online (responses come from the trained weights): use LoRA"
        )
    plugin = arguments.deepspeed_plugin
    if arguments.fsdp or (plugin is not None and plugin.zero_stage == 3):
        raise InputError(
            "online training needs whole weights in every process to draw responses, which FSDP and ZeRO-3 cut into pieces: use "
            "ZeRO-2 or plain data parallelism"
        )
    if data.max_prompt_length + arguments.max_new_tokens > data.max_length:
        raise InputError(
            f"max_prompt_length {data.max_prompt_length} and max_new_tokens {arguments.max_new_tokens} exceed max_length "
            f"{data.max_length}: lower one, or raise max_length"
        )
    if model.use_peft and arguments.backend == "vllm":
        raise InputError(
            "use_peft does not go with backend vllm online (its weights are reloaded whole): use transformers"
        )
    held_out = [split for split in data.dataset_splits if split.startswith("test")]
    if held_out:
        raise InputError(
            f"dataset_splits names {held_out[0]}, which would be trained on: remove it, and name held-out prompts by "
            "eval_prompts"
        )
    if arguments.scorer_settings is not None:
        check_scorer(arguments.scorer_settings)


def check_context(settings: Settings, splits: dict[str, PromptDataset], folder: Path) -> None:
    """Check that the longest prompt and a response fit into the model.

    Raises:
        InputError: naming the prompt.
    """
    from transformers import AutoConfig

    from spin.alignment.chat import context_length

    context = context_length(AutoConfig.from_pretrained(folder, trust_remote_code=settings.model.trust_remote_code))
    for name, dataset in splits.items():
        longest = max(dataset.prompts, key=lambda prompt: len(prompt.token_ids))
        needed = len(longest.token_ids) + settings.arguments.max_new_tokens
        if context is not None and needed > context:
            raise InputError(
                f"prompt {longest.prompt_id} of the {name} split and max_new_tokens need {needed} tokens, but the model takes "
                f"{context}: lower max_new_tokens or max_prompt_length"
            )
        longest = max(dataset.prompts, key=lambda prompt: len(prompt.token_ids) + len(prompt.truth_ids))
        needed = len(longest.token_ids) + len(longest.truth_ids)
        if context is not None and needed > context:
            raise InputError(
                f"prompt {longest.prompt_id} of the {name} split and its ground truth have {needed} tokens, but the model takes "
                f"{context}: lower max_length, to which it is cut"
            )


def check_references(settings: Settings, splits: dict[str, PromptDataset]) -> None:
    """Check that every prompt has the ground truth that the scorer compares with.

    Raises:
        InputError: naming the prompt.
    """
    from spin.alignment.scoring import needs_reference, no_reference

    scorer = settings.arguments.scorer
    if scorer is None or not needs_reference(scorer):
        return
    for dataset in splits.values():
        for prompt in dataset.prompts:
            if not (prompt.reference or "").strip():
                raise no_reference(scorer, prompt.prompt_id)


def make_sampler(settings: Settings, trainer: OnlineTrainer, encoder: ChatEncoder) -> PolicySampler:
    """Return what draws the responses of this process."""
    from spin.alignment.generation import BackendSettings
    from spin.alignment.logps import causal_model
    from spin.alignment.online.samplers import EngineSampler, InPlaceSampler

    arguments = settings.arguments
    model = causal_model(trainer.model)
    backend = BackendSettings(
        model=settings.model.model_name_or_path,
        revision=settings.model.model_revision,
        dtype=settings.model.dtype,
        batch_size=arguments.generation_batch_size,
        max_model_len=settings.data.max_prompt_length + arguments.max_new_tokens,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        trust_remote_code=settings.model.trust_remote_code,
        stop_ids=encoder.stop_ids,
        pad_id=encoder.pad_id,
        decode=encoder.decode,
    )
    if arguments.backend == "vllm":
        return EngineSampler(backend, lambda folder: save_weights(model, folder))
    return InPlaceSampler(model, backend, trainer.own_attention, trainer.compute_loss_context_manager)


def save_weights(model: Any, folder: Path) -> None:
    """Write a module's weights into a folder as a model, in the precision that its configuration names."""
    import torch

    dtype = getattr(torch, str(model.config.dtype or torch.float32).removeprefix("torch."))
    model.save_pretrained(folder, state_dict={name: weight.to(dtype) for name, weight in model.state_dict().items()})


def train(
    settings: Settings,
    splits: dict[str, PromptDataset],
    left_out: dict[str, int],
    encoder: ChatEncoder,
    key: str,
) -> None:
    """Train, save the policy, and write metrics.json last."""
    from spin.alignment.labelling import scorer_record
    from spin.alignment.online.labels import PairMaker
    from spin.alignment.online.trainer import OnlineTrainer
    from spin.alignment.provenance import hash_text
    from spin.alignment.scoring import make_scorer
    from spin.alignment.training_run import OutputFolder, inputs_record, load_policy, push_policy, report, train_policy

    arguments = settings.arguments
    data = hash_text(*(f"{name}={dataset.key}" for name, dataset in sorted(splits.items())), encoder.fingerprint)
    inputs = inputs_record(settings, key, data)
    if arguments.scorer_settings is not None:
        inputs |= scorer_record(arguments.scorer_settings)
    folder = OutputFolder(settings, inputs)
    if folder.is_complete():
        report(settings, f"{folder.path} is complete already")
        push_policy(settings)
        return
    folder.prepare(arguments.process_index == 0)
    scorer = None if arguments.scorer_settings is None else make_scorer(arguments.scorer_settings)
    model, dtypes = load_policy(settings)
    trainer = OnlineTrainer(
        model=model,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits.get("test"),
        processing_class=encoder.tokenizer,
        opponent_hash=key,
        pair_maker=PairMaker(arguments, encoder, scorer),
    )
    trainer.sampler = make_sampler(settings, trainer, encoder)
    counts = {"prompts": {name: len(dataset) for name, dataset in splits.items()}, "left_out": left_out}
    try:
        train_policy(trainer, folder, settings, dtypes, lambda result: counts)
    finally:
        trainer.sampler.close()
        if scorer is not None:
            scorer.close()


def main(arguments: Sequence[str]) -> None:
    if is_help(arguments, USAGE):
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from spin.alignment.configs import load_config

    values = load_config(arguments[0], arguments[1:])
    values.setdefault("dataset_splits", ["train"])
    from spin.alignment.model_utils import model_folder
    from spin.alignment.online.config import OnlineConfig
    from spin.alignment.online.prompts import load_splits
    from spin.alignment.provenance import hash_weights
    from spin.alignment.training_run import make_encoder, read_settings, report, setup_logging

    settings = read_settings(values, arguments[0], OnlineConfig)
    check_settings(settings)
    if settings.arguments.backend == "vllm":
        from spin.alignment.generation.vllm_backend import check_installed

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
    run_program(main, sys.argv[1:])
