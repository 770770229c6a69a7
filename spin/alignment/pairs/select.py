"""Selects the generated responses that a scorer accepts, and writes them as SFT data (rejection sampling)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError

if TYPE_CHECKING:
    from spin.alignment.core.provenance import Provenance
    from spin.alignment.pairs.annotate import Labeller
    from spin.alignment.pairs.config import SelectConfig
    from spin.alignment.pairs.gather import Split

COUNTS = ("prompts", "responses", "failed", "rejected", "truncated", "repeated", "accepted")


def select_responses(config: SelectConfig) -> dict[str, dict[str, int]]:
    """Score the responses of every split and write the accepted ones; return the counts of each split.

    A truncated response is never accepted: SFT would teach the model to end there. Of equal responses to a prompt, one is kept.

    Raises:
        InputError: a setting, a folder or a fraction cannot be used, or no response of a split is accepted.
    """
    from spin.alignment.core.lock import folder_lock
    from spin.alignment.pairs.annotate import Labeller
    from spin.alignment.pairs.convert import show_counts
    from spin.alignment.pairs.counts import read_counts
    from spin.alignment.rewards import check_scorer, make_scorer

    check_scorer(config.scorer_settings)
    config.check_files()
    splits = find_splits(Path(config.input_dir))
    pending = [split for split in splits if not is_complete(config, split)]
    if pending:
        with (
            folder_lock(Path(config.output_dir), setting="output_dir"),
            closing(make_scorer(config.scorer_settings)) as scorer,
        ):
            for split in pending:
                write_split(config, split, Labeller(scorer))
    else:
        say(f"{config.output_dir} is already complete")
    counts = {split.name: read_counts(counts_path(config, split)) for split in splits}
    show_counts(counts)
    return counts


def find_splits(folder: Path) -> list[Split]:
    """Return the splits in a folder of fractions, their headers checked.

    Raises:
        InputError: there is no fraction, one is missing, or they come from different runs.
    """
    from spin.alignment.pairs.gather import Split, find_fractions

    splits = [Split(folder, name) for name in find_fractions(folder)]
    if not splits:
        raise InputError(f"{folder} contains no fraction files such as train-00000.parquet: run spin/generate.py first")
    for split in splits:
        split.survey()
    return splits


def rows_path(config: SelectConfig, split: Split) -> Path:
    return Path(config.output_dir) / f"{split.name}.parquet"


def counts_path(config: SelectConfig, split: Split) -> Path:
    return Path(config.output_dir) / f"{split.name}.counts.json"


def make_provenance(config: SelectConfig, split: Split) -> Provenance:
    """Return the provenance of the accepted responses: that of the responses, and the scorer and its threshold."""
    from dataclasses import replace

    from spin.alignment.pairs.annotate import scorer_record

    assert split.origin is not None
    made = split.origin.provenance
    selected = {"threshold": config.threshold, **scorer_record(config.scorer_settings)}
    # In ``sampling``, because differences() compares it.
    return replace(made, kind="accepted", sampling=made.sampling | selected, data_frac=0, extra={})


def is_complete(config: SelectConfig, split: Split) -> bool:
    """Return whether the rows of a split are there already; with a damaged counts file they are written again.

    Raises:
        InputError: they were selected from other inputs or with other settings, and ``overwrite`` is not set.
    """
    from spin.alignment.core.parquet import open_parquet
    from spin.alignment.core.provenance import read_provenance
    from spin.alignment.pairs.counts import read_counts

    path = rows_path(config, split)
    if config.overwrite or not path.exists() or not counts_path(config, split).exists():
        return False
    differences = make_provenance(config, split).differences(read_provenance(open_parquet(path).schema_arrow, path))
    if differences:
        raise InputError(
            f"{path} was selected from other inputs ({'; '.join(differences)}): choose another output_dir or pass --overwrite"
        )
    try:
        read_counts(counts_path(config, split))
    except InputError:
        return False
    return True


def write_split(config: SelectConfig, split: Split, labeller: Labeller) -> None:
    """Write the accepted responses of a split, then their counts."""
    from spin.alignment.core.files import remove_files
    from spin.alignment.core.parquet import ParquetSink
    from spin.alignment.data.rows import PROMPT_SCHEMA, Features
    from spin.alignment.pairs.counts import write_counts

    counts = dict.fromkeys(COUNTS, 0)
    rows, features = [], Features()
    while (fraction := split.take()) is not None:
        for batch in split.read(fraction):
            found = batch.to_pylist()
            prompts = [
                found[start : start + fraction.num_samples] for start in range(0, len(found), fraction.num_samples)
            ]
            labeller.label(prompts)
            rows += [row for prompt in prompts for row in accepted(prompt, config.threshold, counts)]
    split.conclude()
    if not rows:
        raise InputError(
            f"no response of the split '{split.name}' is accepted ({counts['responses']} responses, {counts['truncated']} "
            f"truncated): lower threshold, or sample more responses with --num_samples"
        )
    for row in rows:
        features.add(row)
    path, count_file = rows_path(config, split), counts_path(config, split)
    remove_files([count_file])
    with ParquetSink(path, features.extend(PROMPT_SCHEMA), make_provenance(config, split)) as sink:
        sink.write(rows)
    write_counts(count_file, counts)


def accepted(prompt: Sequence[dict[str, Any]], threshold: float, counts: dict[str, int]) -> list[dict[str, Any]]:
    """Return the prompt rows of the accepted responses to one prompt, and update the counts.

    Args:
        prompt: its generated rows, with their scores.
    """
    from spin.alignment.data.rows import carried_columns
    from spin.alignment.data.turns import answer_text, present_fields

    counts["prompts"] += 1
    rows: dict[str, dict[str, Any]] = {}
    for row in sorted(prompt, key=lambda item: int(item["sample_index"])):
        counts["responses"] += 1
        score, text = row["rejected_score"], answer_text(row["rejected"][-1])
        if score is None:
            counts["failed"] += 1
        elif score < threshold:
            counts["rejected"] += 1
        elif row["rejected_finish_reason"] == "length":
            counts["truncated"] += 1
        elif text in rows:
            counts["repeated"] += 1
        else:
            turns = [present_fields(turn) for turn in row["rejected"]]
            rows[text] = {
                "prompt_id": f"{row['prompt_id']}#{row['sample_index']}",
                "chosen": turns,
                **carried_columns(row),
            }
    counts["accepted"] += len(rows)
    return list(rows.values())
