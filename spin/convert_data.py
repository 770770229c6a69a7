"""Step 1.5: shards of generated responses -> preference parquet.

Gathers the fractions of every split in a folder, proves that each prompt and sample is there exactly once, forms pairs
prompt by prompt, and writes ``{split}_prefs-00000-of-0000N.parquet``; ``{split}_prefs.counts.json`` appears last and proves
that the set is whole. Record batches stream through in constant memory; with ``--wait`` while fractions are still being made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spin.alignment.core.program import interrupt_on_sigterm, run_program
from spin.alignment.pairs.convert import (
    check_options,
    check_output,
    find_splits,
    make_files,
    make_parser,
    show_counts,
    write_sets,
)


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    check_options(options)
    interrupt_on_sigterm()
    from spin.alignment.core.files import read_json
    from spin.alignment.core.lock import folder_lock

    output_dir = Path(options.output_dir)
    splits = find_splits(options)
    sets = {split.name: make_files(split, options) for split in splits if split.origin}
    check_output(output_dir, sets, splits, options.overwrite)
    if not options.overwrite and len(sets) == len(splits) and all(files.is_whole() for files in sets.values()):
        print(f"{output_dir} is complete already")
        show_counts({split: read_json(files.counts_path) for split, files in sets.items()})
        return
    with folder_lock(output_dir, setting="output_dir"):
        write_sets(splits, sets, options)
    show_counts({split.name: sets[split.name].counts for split in splits})
    for item in (skipped for split in splits for skipped in split.skipped):
        print(f"  skipped by generation: {item['prompt_id']} ({item['reason']})")


if __name__ == "__main__":
    run_program(main)
