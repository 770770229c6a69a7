"""The SFT start, and the continued-SFT control: thin over TRL's SFTTrainer, same data, prompts and truncation as SPIN.

    accelerate launch spin/run_sft.py CONFIG.yaml [--key=value ...]

Only response tokens are learned. ``init_from_config: true`` starts from random weights. The output folder is that of run_spin.py.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spin.alignment.errors import InputError
from spin.programs import is_help, run_program

if TYPE_CHECKING:
    from datasets import Dataset

    from spin.alignment.chat import ChatEncoder
    from spin.alignment.training_run import Settings

USAGE = """usage: accelerate launch spin/run_sft.py CONFIG.yaml [--key=value ...]

Fine-tunes on the ground truth. CONFIG.yaml and --key=value hold

  model    model_name_or_path model_revision dtype attn_implementation trust_remote_code init_from_config
           use_peft lora_r lora_alpha lora_target_modules load_in_4bit load_in_8bit
  data     dataset_mixer dataset_splits max_length max_prompt_length system preprocessing_num_workers
  output   output_dir overwrite_output_dir resume_from_checkpoint

and every key of trl.SFTConfig. docs/configuration.md explains each."""


def encode_truth(
    prompts: Dataset, encoder: ChatEncoder, settings: Settings, source: str
) -> tuple[Dataset, Counter[str]]:
    """Encode prompts with their ground truth; return input_ids and labels (-100 on the prompt), and what was dropped."""
    from datasets import Dataset

    from spin.alignment.chat import encode_pair

    rows, dropped = [], Counter[str]()
    for index, row in enumerate(prompts):
        # A pair whose rejected side is one token: the truncation is then that of preference training.
        stub = {"rejected": row["chosen"], "rejected_token_ids": [encoder.end_id]}
        pair_row = {"prompt_id": row["prompt_id"], "chosen": row["chosen"], **stub}
        try:
            pair = encode_pair(pair_row, encoder, settings.data.max_length, settings.data.max_prompt_length)
        except InputError as error:
            raise InputError(f"{source} row {index} (prompt {row['prompt_id']}): {error}") from error
        if isinstance(pair, str):
            dropped[pair] += 1
            continue
        ids = [*pair.prompt_ids, *pair.chosen_ids]
        rows.append({"input_ids": ids, "labels": [-100] * len(pair.prompt_ids) + pair.chosen_ids})
    if not rows:
        raise InputError(f"{source}: no row is left to train on ({dict(dropped)}): check the data, or raise max_length")
    return Dataset.from_list(rows), dropped


def load_truth(settings: Settings, encoder: ChatEncoder) -> tuple[dict[str, Dataset], dict[str, int]]:
    """Load and mix the prompts of every data set; return the encoded splits and the counts of dropped rows by reason."""
    from datasets import concatenate_datasets

    from spin.alignment.data import load_prompts

    pieces: dict[str, list[Dataset]] = {}
    dropped: Counter[str] = Counter()
    for split in settings.data.dataset_splits:
        name = "test" if split.startswith("test") else "train"
        for source, fraction in settings.data.dataset_mixer.items():
            if not 0 < fraction <= 1:
                raise InputError(f"dataset_mixer gives {source} the fraction {fraction}: set it above 0 and at most 1")
            prompts = load_prompts(source, split.removesuffix("_prefs"))
            if name == "train" and fraction < 1:
                prompts = prompts.shuffle(seed=settings.arguments.seed).select(
                    range(max(1, int(fraction * len(prompts))))
                )
            encoded, lost = encode_truth(prompts, encoder, settings, source)
            pieces.setdefault(name, []).append(encoded)
            dropped += lost
    if "train" not in pieces:
        raise InputError(f"dataset_splits is {settings.data.dataset_splits}: name a training split such as train")
    return {name: concatenate_datasets(parts) for name, parts in pieces.items()}, dict(dropped)


def train(settings: Settings, data: dict[str, Dataset], dropped: dict[str, int], tokenizer: Any, key: str) -> None:
    """Train, save the model, and write metrics.json last."""
    from spin.alignment.provenance import hash_json
    from spin.alignment.sft import TruthTrainer
    from spin.alignment.training_run import OutputFolder, inputs_record, load_policy, push_policy, report, train_policy

    content = hash_json({split: [rows["input_ids"], rows["labels"]] for split, rows in data.items()})
    folder = OutputFolder(settings, inputs_record(settings, key, content))
    if folder.is_complete():
        report(settings, f"{folder.path} is complete already")
        push_policy(settings)
        return
    folder.prepare(settings.arguments.process_index == 0)
    model, dtypes = load_policy(settings)
    trainer = TruthTrainer(
        model=model,
        args=settings.arguments,
        train_dataset=data["train"],
        eval_dataset=data.get("test"),
        processing_class=tokenizer,
    )
    counts = {"rows": {split: len(rows) for split, rows in data.items()}, "dropped": dropped}
    train_policy(trainer, folder, settings, dtypes, lambda result: counts)


def main(arguments: Sequence[str]) -> None:
    if is_help(arguments, USAGE):
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from spin.alignment.configs import load_config

    values = load_config(arguments[0], arguments[1:])
    from spin.alignment.model_utils import model_folder
    from spin.alignment.provenance import hash_file, hash_weights
    from spin.alignment.sft import SFTArguments
    from spin.alignment.training_run import make_encoder, read_settings, report, setup_logging

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
    run_program(main, sys.argv[1:])
