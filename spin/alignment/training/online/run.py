"""The online training program: its checks, its scorer and sampler, and its trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from spin.alignment.core.cards import TAG
from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_text
from spin.alignment.data.split_names import is_held_out
from spin.alignment.generation import find_backend
from spin.alignment.methods.pairings import find_pairing
from spin.alignment.models.sharded import offloads_weights, sharding_name
from spin.alignment.pairs.annotate import scorer_record
from spin.alignment.training.accounting import accounting
from spin.alignment.training.described import Described, describe_function
from spin.alignment.training.moving_reference import check_can_exchange
from spin.alignment.training.online.config import OnlineConfig
from spin.alignment.training.online.labels import PairMaker, scorer_of
from spin.alignment.training.online.pass_rates import pass_names
from spin.alignment.training.online.prompts import PromptDataset, check_scorable, load_splits
from spin.alignment.training.online.sharers import check_can_share
from spin.alignment.training.online.trainer import OnlineTrainer
from spin.alignment.training.program import TrainingData, TrainingJob, TrainingProgram
from spin.alignment.training.settings import Settings

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.rewards.base import GroupScorer
    from spin.alignment.training.online.policy_sampler import PolicySampler


def check_settings(settings: Settings) -> None:
    """Check what needs no model: the scorer, and incompatible settings.

    Raises:
        InputError: a setting cannot be used; the message names the key and the fix.
    """
    from spin.alignment.rewards import check_scorer

    arguments, model, data = settings.arguments, settings.model, settings.data
    if model.init_from_config:
        raise InputError(
            "init_from_config cannot be used here (an untrained policy produces no useful responses): use run_sft.py"
        )
    if model.load_in_4bit or model.load_in_8bit:
        raise InputError(
            "load_in_4bit and load_in_8bit do not work online (responses come from the trained weights): use LoRA"
        )
    check_sharding(arguments)
    held_out = [split for split in data.dataset_splits if is_held_out(split)]
    if held_out:
        raise InputError(
            f"dataset_splits contains {held_out[0]}, which would be trained on: remove it, and set eval_prompts for held-out "
            "prompts"
        )
    if arguments.scorer_settings is not None:
        check_scorer(arguments.scorer_settings)


def check_sharding(arguments: Any) -> None:
    """Check that responses can be sampled, and a reference kept, with the policy as it will be sharded.

    Raises:
        InputError: they cannot; the message names the fix.
    """
    sharding, offloads = sharding_name(arguments), offloads_weights(arguments)
    if sharding == "FSDP1":
        raise InputError(
            "online training takes FSDP version 2, not 1: set fsdp_version: 2 as in configs/fsdp2.yaml, or use ZeRO-3"
        )
    if sharding == "FSDP2" and offloads and find_backend(arguments.backend).online == "own_module":
        raise InputError(
            f"backend {arguments.backend} cannot decode with weights that FSDP keeps on the CPU: set fsdp_offload_params: false, "
            "or use backend vllm"
        )
    for key, without in (("ref_update_freq", 1), ("async_steps", 0), ("alpha", 0)):
        if getattr(arguments, key) != without:
            check_can_exchange(arguments, key)


def check_context(settings: Settings, splits: dict[str, PromptDataset], folder: Path) -> None:
    """Check that the longest prompt plus a response fits into the model's context, and all ids into its vocabulary.

    Raises:
        InputError: they do not; the message names the prompt.
    """
    from spin.alignment.models.folder import context_length
    from spin.alignment.models.positions import fixed_positions
    from spin.alignment.models.vocabulary import check_ids
    from spin.alignment.models.weights_check import check_model

    trusted, model = settings.model.trust_remote_code, settings.model.model_name_or_path
    config = check_model(folder, trust_remote_code=trusted, needs_weights=False)
    fixed = fixed_positions(config.get_text_config(decoder=True).to_dict())
    context = min((length for length in (context_length(config), fixed) if length is not None), default=None)
    heads, size = config.get_text_config().num_attention_heads, settings.arguments.tensor_parallel_size
    if heads % size:
        raise InputError(
            f"tensor_parallel_size is {size}, but {model} has {heads} attention heads, which it does not divide: set it to a "
            "divisor"
        )
    for name, dataset in splits.items():
        for prompt in dataset.prompts:
            where = f"prompt {prompt.prompt_id} of the {name} split"
            check_ids((*prompt.token_ids, *prompt.ground_truth_ids), config, model, where)
        longest = max(dataset.prompts, key=lambda prompt: len(prompt.token_ids))
        needed = len(longest.token_ids) + settings.arguments.max_new_tokens
        if context is not None and needed > context:
            raise InputError(
                f"prompt {longest.prompt_id} of the {name} split and max_new_tokens need {needed} tokens, but the model takes "
                f"{context}: lower max_new_tokens or max_prompt_length"
            )
        longest = max(dataset.prompts, key=lambda prompt: len(prompt.token_ids) + len(prompt.ground_truth_ids))
        needed = len(longest.token_ids) + len(longest.ground_truth_ids)
        if context is not None and needed > context:
            raise InputError(
                f"prompt {longest.prompt_id} of the {name} split and its ground truth have {needed} tokens, but the model takes "
                f"{context}: lower max_length, to which they are truncated"
            )


class OnlineTraining(TrainingProgram):
    """Trains a policy on its own responses, sampled and labelled step by step."""

    script = "run_online.py"
    arguments_class = OnlineConfig
    defaults: ClassVar[Mapping[str, Any]] = {"dataset_splits": ["train"]}

    def __init__(self) -> None:
        self.scorer: GroupScorer | None = None
        self.sampler: PolicySampler | None = None

    def check_settings(self, settings: Settings) -> None:
        """Check what needs no model, and that the generation backend is installed."""
        check_settings(settings)
        find_backend(settings.arguments.backend).check_installed()

    def held_out_metrics(self, arguments: Any) -> list[str]:
        """Return the measures of the responses to held-out prompts at each temperature."""
        names = []
        for temperature in arguments.eval_temperatures:
            samples = arguments.samples_at(temperature)
            measures = ["score", "length", "truncated", *(pass_names(samples) if samples > 1 else [])]
            names += [f"t{temperature:g}_{name}" for name in measures]
        return names

    def load_data(self, settings: Settings, encoder: ChatEncoder) -> TrainingData:
        """Load, mix and encode the prompts; skipped ones are counted by split and reason."""
        data = TrainingData(*load_splits(settings.data, settings.arguments, encoder))
        for prompts in data.splits.values():
            check_scorable(prompts, settings.arguments.scorer)
        return data

    def describe_data(self, data: TrainingData) -> list[str]:
        """Return a line per split with the number of prompts, and of those skipped."""
        return [
            f"{split}: {number} prompts"
            + "".join(f", {count} skipped: {reason}" for reason, count in data.dropped[split].items())
            for split, number in data.sizes().items()
        ]

    def check_data(self, settings: Settings, data: TrainingData, model_folder: Path) -> None:
        """Check that prompts and responses fit into the model's context."""
        check_context(settings, data.splits, model_folder)

    def data_key(self, job: TrainingJob) -> str:
        """Return a hash of the prompts and of the encoder (tokenizer and chat template)."""
        keys = (f"{split}={dataset.key}" for split, dataset in sorted(job.data.splits.items()))
        return hash_text(*keys, job.encoder.fingerprint)

    def inputs(self, job: TrainingJob) -> dict[str, Any]:
        """Return everything that determines the result, including the scorer."""
        scorer = job.settings.arguments.scorer_settings
        return super().inputs(job) | ({} if scorer is None else scorer_record(scorer))

    def describe(self, settings: Settings) -> Described:
        """Return the pairing, the scorer, and the loss with its source and formula."""
        arguments = settings.arguments
        scorer = f"scored by `{arguments.scorer}`" if arguments.scorer else "not scored"
        return Described(
            title="Policy trained online on its own responses",
            tags=(TAG, "self-play", "online", arguments.loss_type.partition(":")[0]),
            method=(
                f"In every step, the policy samples responses to its prompts; they are {scorer} and paired as they arrive.",
                f"Pairing {describe_function(arguments.pairing, find_pairing(arguments.pairing).pair)}",
                f"Loss {describe_function(arguments.loss_type, arguments.loss.function)}",
                f"beta = {arguments.beta:g}.",
            ),
            limits=("The model learns what its scorer rewards, including the scorer's mistakes.",),
        )

    def open(self, settings: Settings) -> None:
        """Check that the processes can share engines, and create the scorer of the responses."""
        check_can_share(settings.arguments.tensor_parallel_size)
        self.scorer = scorer_of(settings.arguments)

    def make_trainer(self, job: TrainingJob, model: Any) -> OnlineTrainer:
        """Return the trainer of a policy, which also creates its sampler."""
        arguments = job.settings.arguments
        trainer = OnlineTrainer(
            model=model,
            args=arguments,
            train_dataset=job.data.splits["train"],
            eval_dataset=job.data.splits.get("test"),
            processing_class=job.encoder.tokenizer,
            reference_hash=job.model_key,
            pair_maker=PairMaker(arguments, job.encoder, self.scorer),
            source=job.settings.model,
        )
        self.sampler = trainer.sampler
        return trainer

    def metrics(self, job: TrainingJob, trainer: OnlineTrainer, result: Any) -> dict[str, Any]:
        """Return the numbers of prompts."""
        return {
            "prompts": job.data.sizes(),
            "left_out": job.data.dropped,
            "accounting": accounting({}, trainer.totals()),
        }

    def close(self) -> None:
        """Shut down the sampler and the scorer."""
        if self.sampler is not None:
            self.sampler.close()
        if self.scorer is not None:
            self.scorer.close()
