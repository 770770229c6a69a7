"""Whether the fractions that were asked for exist already, from the files themselves: neither prompts nor model are read."""

from __future__ import annotations

from pathlib import Path

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import check_whole, open_parquet
from spin.alignment.core.provenance import Provenance, read_provenance
from spin.alignment.data.fractions import fraction_path, num_fractions
from spin.alignment.generation.config import GenerateConfig


def is_already_complete(path: Path, stated: Provenance) -> bool:
    """Return whether a fraction exists and was generated with the same settings from byte-identical input files."""
    if not path.exists() or not stated.extra:
        return False
    try:
        found = read_provenance(open_parquet(path).schema_arrow, path)
        check_whole(path)
    except InputError:  # damaged: wanted_fractions() sets it aside and says so
        return False
    derived = ("tokenizer_hash", "chat_template_hash", "prompts_hash", "num_prompts", "data_frac", "extra")
    return not stated.differences(found, ignore=derived) and stated.extra["inputs"] == found.extra.get("inputs")


def already_complete(config: GenerateConfig, stated: Provenance) -> int:
    """Return the number of prompts if all requested fractions are complete, else 0; read from the fractions, not the prompts."""
    first = fraction_path(config.output_dir, config.split, 0 if config.data_frac == "auto" else config.data_frac)
    if not is_already_complete(first, stated):
        return 0
    num_prompts = read_provenance(open_parquet(first).schema_arrow, first).num_prompts
    others = range(1, num_fractions(num_prompts, config.frac_len)) if config.data_frac == "auto" else ()
    paths = (fraction_path(config.output_dir, config.split, number) for number in others)
    return num_prompts if all(is_already_complete(path, stated) for path in paths) else 0
