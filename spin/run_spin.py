"""Step 2: preference parquet -> checkpoint, the policy of the next iteration and its opponent.

    accelerate launch --config_file configs/multi_gpu.yaml spin/run_spin.py configs/config.yaml [--key=value ...]

Writes into ``output_dir``: the model (loads by itself), ``metrics.json``, ``inputs.json`` (what it was trained from) and the
Trainer's checkpoints. Started again after a crash it resumes from the last complete checkpoint.
"""

from __future__ import annotations

import math
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
    from spin.alignment.configs import DataConfig
    from spin.alignment.training_run import Settings

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


HALVES = ("chosen", "rejected")


def encode_split(
    rows: Dataset, encoder: ChatEncoder, config: DataConfig, loss_type: str = "sigmoid", reverse: bool = False
) -> tuple[Dataset, dict[str, int]]:
    """Encode preference rows to ids, token weights and the labels that the loss reads; return the encoded rows and how
    many were dropped for which reason. ``reverse`` lets chosen and rejected change places, with all they have.

    Raises:
        InputError: naming the row, the missing columns, or when no pair is left.
    """
    from spin.alignment.chat import encode_pair
    from spin.alignment.losses import LOSS_COLUMNS, loss_feature

    label = LOSS_COLUMNS.get(loss_type)
    check_label_columns(rows, loss_type, label)
    weighted = [half for half in HALVES if f"{half}_weights" in rows.column_names]
    if len(weighted) == 1:
        raise InputError(f"the pairs have the column {weighted[0]}_weights alone: weigh them again, or remove it")
    targets = dict(zip(HALVES, reversed(HALVES) if reverse else HALVES, strict=True))

    def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            pair = encode_pair(row, encoder, config.max_length, config.max_prompt_length)
            whole = None if isinstance(pair, str) else pair
            found: dict[str, Any] = {"prompt_ids": whole.prompt_ids if whole else [], "dropped": "" if whole else pair}
            for half, other in targets.items():
                ids = getattr(whole, f"{half}_ids") if whole else []
                found[f"{other}_ids"] = ids
                if half in weighted:
                    is_cut = whole is not None and len(whole.prompt_ids) + len(ids) >= config.max_length
                    found[f"{other}_weights"] = weights_of(row, half, len(ids), is_cut) if whole else []
                if label is not None:
                    found[f"{other}_{loss_feature(label)}"] = label_of(row, f"{half}_{label}")
        except InputError as error:
            raise InputError(f"{row['source']} row {index} (prompt {row['prompt_id']}): {error}") from error
        return found

    workers = config.preprocessing_num_workers if len(rows) > 1000 else 1
    encoded = rows.map(
        encode,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=workers if workers > 1 else None,
        load_from_cache_file=False,
        desc="encode pairs",
    )
    dropped = Counter(reason for reason in encoded["dropped"] if reason)
    kept = [index for index, reason in enumerate(encoded["dropped"]) if not reason]
    if not kept:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.items())
        raise InputError(f"no pair is left to train on ({reasons}): check the data, or raise max_length")
    return encoded.select(kept).remove_columns("dropped"), dict(dropped)


def check_label_columns(rows: Dataset, loss_type: str, label: str | None) -> None:
    """Check that the pairs have the label that a loss reads, and a preferred response where it needs one.

    Raises:
        InputError: naming the missing columns, and the pairing that writes them.
    """
    from spin.alignment.pairing import PAIRINGS

    if "chosen_reward" in rows.column_names and label != "reward":
        sources = ", ".join(sorted(set(rows["source"])))
        raise InputError(
            f"the pairs in {sources} hold rewards and prefer no response (pairing every_sample), but loss_type {loss_type} "
            "compares two: set loss_type: sppo_reward, or convert the data with another pairing"
        )
    if label is None:
        return
    missing = [name for half in HALVES if (name := f"{half}_{label}") not in rows.column_names]
    if missing:
        pairing = next(name for name, found in PAIRINGS.items() if missing[0] in getattr(found, "adds", ()))
        sources = ", ".join(sorted(set(rows["source"])))
        raise InputError(
            f"loss_type {loss_type} reads {' and '.join(missing)}, which the pairs in {sources} do not have: convert the data "
            f"with --pairing {pairing}, or choose another loss_type"
        )


def weights_of(row: dict[str, Any], half: str, count: int, is_cut: bool = True) -> list[float]:
    """Return the weights of the ``count`` tokens of a response that are left after truncation (unless it was not cut)."""
    weights, ids = row[f"{half}_weights"], row.get(f"{half}_token_ids")
    whole = len(ids) if ids is not None else None if is_cut else count
    if weights is None or len(weights) < count or (whole is not None and len(weights) != whole):
        found = "none" if weights is None else len(weights)
        raise InputError(
            f"{half}_weights must hold a weight for each token ({max(count, len(ids or ()))}), but there are {found}: weigh it "
            "again with spin/estimate_weights.py"
        )
    if not all(map(math.isfinite, weights[:count])):
        place = next(place for place, weight in enumerate(weights[:count]) if not math.isfinite(weight))
        raise InputError(
            f"{half}_weights is {weights[place]} at token {place}: weigh it again with a max_length as large as that of the "
            "training"
        )
    return list(weights[:count])


def label_of(row: dict[str, Any], name: str) -> float:
    """Return a label of a response: a finite number, a probability where it is one."""
    value = row[name]
    if value is None or not math.isfinite(value) or ("win_prob" in name and not 0 <= value <= 1):
        wanted = "a probability" if "win_prob" in name else "a finite number"
        raise InputError(f"{name} is {value}, not {wanted}: convert the data again")
    return float(value)


def load_pairs(settings: Settings, encoder: ChatEncoder) -> tuple[dict[str, Dataset], dict[str, dict[str, int]]]:
    """Load, mix and encode the data; return the encoded splits and what was dropped from each."""
    from spin.alignment.data import mix_preferences

    mixed = mix_preferences(settings.data.dataset_mixer, settings.data.dataset_splits, settings.arguments.seed)
    encoded, dropped = {}, {}
    arguments = settings.arguments
    for split, rows in mixed.items():
        encoded[split], dropped[split] = encode_split(
            rows, encoder, settings.data, arguments.loss_type, arguments.reverse
        )
    return encoded, dropped


def train(
    settings: Settings, pairs: dict[str, Dataset], dropped: dict[str, dict[str, int]], tokenizer: Any, key: str
) -> None:
    """Train, save the policy, and write metrics.json last."""
    from spin.alignment.batching import PairDataset
    from spin.alignment.shards import read_json
    from spin.alignment.trainer import FIRST_LOSS_FILE, SPINTrainer
    from spin.alignment.training_run import OutputFolder, inputs_record, load_policy, push_policy, report, train_policy

    folder = OutputFolder(settings, inputs_record(settings, key, data_key(pairs)))
    if folder.is_complete():
        report(settings, f"{folder.path} is complete already")
        push_policy(settings)
        return
    folder.prepare(settings.arguments.process_index == 0)
    model, dtypes = load_policy(settings)
    trainer = SPINTrainer(
        model=model,
        args=settings.arguments,
        train_dataset=PairDataset(pairs["train"]),
        eval_dataset=PairDataset(pairs["test"]) if "test" in pairs else None,
        processing_class=tokenizer,
        opponent_hash=key,
    )

    def describe(result: Any) -> dict[str, Any]:
        # The Trainer's clock starts before the opponent's log-probs are computed.
        runtime = result.metrics["train_runtime"] - trainer.reference_seconds
        return {
            "first_loss": read_json(folder.path / FIRST_LOSS_FILE),
            "reference_seconds": round(trainer.reference_seconds, 2),
            "seconds_per_step": round(runtime / max(1, trainer.steps_run), 4),
            "completion_tokens": trainer.tokens_seen,
            "completion_tokens_per_second": round(trainer.tokens_seen / max(runtime, 1e-9), 1),
            "pairs": {split: len(rows) for split, rows in pairs.items()},
            "dropped": dropped,
        }

    train_policy(trainer, folder, settings, dtypes, describe)


def data_key(pairs: dict[str, Dataset]) -> str:
    """Return one hash of the encoded pairs of all splits: ids, and weights and labels where there are any."""
    from spin.alignment.provenance import hash_text
    from spin.alignment.reference import hash_tokens

    parts = []
    for split, rows in sorted(pairs.items()):
        parts.append(f"{split}={hash_tokens(rows)}")
        others = sorted(name for name in rows.column_names if not name.endswith("_ids"))
        parts += [f"{split}.{name}={hash_text(*map(str, rows[name]))}" for name in others]
    return hash_text(*parts)


def largest(pairs: dict[str, Dataset]) -> tuple[int, int]:
    """Return the length (tokens) of the longest prompt with response, and the largest token id."""
    import pyarrow.compute as pc

    length = token = 0
    for rows in pairs.values():
        table = rows.with_format("arrow")[:]
        prompts = pc.list_value_length(table["prompt_ids"])
        for half in ("chosen_ids", "rejected_ids"):
            length = max(length, pc.max(pc.add(prompts, pc.list_value_length(table[half]))).as_py())
        token = max(
            token, *(pc.max(pc.list_flatten(table[name])).as_py() for name in table.column_names if "_ids" in name)
        )
    return length, token


def check_budget(pairs: dict[str, Dataset], settings: Settings) -> None:
    """Check that every pair fits into a micro-batch.

    Raises:
        InputError: naming the longest pair.
    """
    import pyarrow.compute as pc

    budget = settings.arguments.max_tokens_per_batch
    prompts = 1 if settings.arguments.share_prompts else 2
    for split, rows in pairs.items():
        if budget is None:
            continue
        table = rows.with_format("arrow")[:]
        prompt, chosen, rejected = (
            pc.list_value_length(table[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")
        )
        tokens = pc.add(pc.multiply(prompt, prompts), pc.add(chosen, rejected))
        longest = pc.max(tokens).as_py()
        if longest > budget:
            raise InputError(
                f"max_tokens_per_batch is {budget}, but pair {pc.index(tokens, longest).as_py()} of {split} takes {longest} "
                f"tokens (prompt, chosen and rejected): raise it to {longest}, or lower max_length"
            )


def main(arguments: Sequence[str]) -> None:
    if is_help(arguments, USAGE):
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from spin.alignment.configs import load_config

    values = load_config(arguments[0], arguments[1:])
    from spin.alignment.model_utils import check_fits, model_folder
    from spin.alignment.position_kl import check_can_keep_opponent
    from spin.alignment.provenance import hash_weights
    from spin.alignment.trainer import SPINConfig
    from spin.alignment.training_run import make_encoder, read_settings, report, setup_logging

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
    check_budget(pairs, settings)
    key = hash_weights(folder)
    if model.load_in_4bit or model.load_in_8bit:
        key += "-4bit" if model.load_in_4bit else "-8bit"
    train(settings, pairs, dropped, encoder.tokenizer, key)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
