"""Online training: checks, sampler, and the training itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.training.online.prompts import PromptDataset
    from spin.alignment.training.online.samplers import PolicySampler
    from spin.alignment.training.online.trainer import OnlineTrainer
    from spin.alignment.training.settings import Settings


def check_settings(settings: Settings) -> None:
    """Check what needs no model: the scorer, and settings that do not go together.

    Raises:
        InputError: naming the key and the mend.
    """
    from spin.alignment.rewards import check_scorer

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

    from spin.alignment.models.folder import context_length

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
    from spin.alignment.rewards import needs_reference, no_reference

    scorer = settings.arguments.scorer
    if scorer is None or not needs_reference(scorer):
        return
    for dataset in splits.values():
        for prompt in dataset.prompts:
            if not (prompt.reference or "").strip():
                raise no_reference(scorer, prompt.prompt_id)


def make_sampler(settings: Settings, trainer: OnlineTrainer, encoder: ChatEncoder) -> PolicySampler:
    """Return what draws the responses of this process."""
    from spin.alignment.generation.base import BackendSettings
    from spin.alignment.logprobs.forward import causal_model
    from spin.alignment.training.online.samplers import EngineSampler, InPlaceSampler

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
    return InPlaceSampler(model, backend, trainer.pair_forward.own_attention, trainer.compute_loss_context_manager)


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
    from spin.alignment.core.provenance import hash_text
    from spin.alignment.pairs.annotate import scorer_record
    from spin.alignment.rewards import make_scorer
    from spin.alignment.training.online.labels import PairMaker
    from spin.alignment.training.online.trainer import OnlineTrainer
    from spin.alignment.training.output_dir import OutputFolder
    from spin.alignment.training.run import load_policy, push_policy, report, train_policy
    from spin.alignment.training.settings import inputs_record

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
