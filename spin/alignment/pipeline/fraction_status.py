"""The progress of the fractions of a generation, and the processes that work on them."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from spin.alignment.core.console import say


def workers_of(output_dir: Path) -> list[dict[str, Any]]:
    """Return the heartbeats of the processes that work, or have worked, on a folder of fractions, by name."""
    from spin.alignment.data.fractions import PARTS_FOLDER
    from spin.alignment.generation.leases import is_known_dead, read_worker

    found = []
    for path in sorted((output_dir / PARTS_FOLDER / "workers").glob("*.json")):
        record = read_worker(path)
        if record is None:
            continue
        if record.get("state") == "working" and is_known_dead(record):
            record["state"] = "killed"
        # Compares the file server's clock with this machine's: only shown to the user, no decision depends on it.
        record["age"] = max(0.0, time.time() - path.stat().st_mtime)
        found.append(record)
    return found


def describe_worker(record: dict[str, Any]) -> str:
    """Return one line on a worker: its rates, its share of truncated responses, and the age of its last heartbeat."""
    name, seconds = record["worker"], record.get("seconds", 0)
    if not seconds:
        return f"{name}: has written nothing yet"
    rows, tokens = record["rows"], record["tokens"]
    return (
        f"{name}: {record['prompts']} prompts, {rows / seconds:.1f} rows/s, {tokens / seconds:.0f} tokens/s, "
        f"{record['cut'] / max(rows, 1):.1%} truncated, last heartbeat {record['age']:.0f} s ago"
    )


def show_fractions(folder: Path) -> bool:
    """Print the progress of the fractions in a folder and who works on them; return False if it contains none."""
    from spin.alignment.core.parquet import open_parquet
    from spin.alignment.core.provenance import read_provenance
    from spin.alignment.data.fractions import PARTS_FOLDER, num_fractions
    from spin.alignment.generation.fraction_journal import finished_prompts

    workers = workers_of(folder)
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.parquet")):
        if found := re.fullmatch(r"(.+)-\d{5}", path.stem):
            splits.setdefault(found[1], []).append(path)
    open_folders = sorted((folder / PARTS_FOLDER).glob("*-[0-9][0-9][0-9][0-9][0-9]-*/"))
    if not splits and not open_folders and not workers:
        return False
    for split, paths in splits.items():
        made = read_provenance(open_parquet(paths[0]).schema_arrow, paths[0])
        rows = sum(open_parquet(path).metadata.num_rows for path in paths)
        total = num_fractions(made.num_prompts, made.frac_len)
        say(f"{split}: {len(paths)} of {total} fractions, {rows} rows")
    for path in open_folders:
        say(f"{path.name.rpartition('-')[0]}: {finished_prompts(path)} prompts finished, not complete yet")
    for record in workers:
        seconds = record.get("seconds_left", 0) if record["state"] == "working" else 0
        left = f", {seconds:.0f} s left" if seconds else ""
        say(f"{describe_worker(record)}{left} ({record['state']})")
    return True
