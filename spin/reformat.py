"""Step 0: foreign SFT data -> prompts + ground truth.

Writes ``{split}.parquet`` (and ``test.parquet`` when a test size is given) with the columns

    prompt_id   the row's own id, else a hash of its prompt; unique
    chosen      the whole conversation, ending in the assistant turn to be played

Rows stream through twice: once to rank every prompt by a keyed hash, once to write. The ranks decide the subset and the
test split, so neither depends on the order of the rows. Prompts with one opening (all turns before the first answer) are
never parted between training and test, for the answer to one may stand in the prompt of another. 24 bytes a prompt are
held in memory, some 70 while they are sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spin.alignment.core.errors import InputError
from spin.alignment.core.program import run_program
from spin.alignment.data.reformat import (
    Source,
    already_there,
    make_parser,
    select,
    source_hash,
    stale_test_split,
    write,
)

if TYPE_CHECKING:
    pass


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    if options.test_size < 0 or options.subset < 0:
        raise InputError("test_size and subset must not be negative: give 0 or more")
    if not (options.test_size < 1 or options.test_size.is_integer()):
        raise InputError(f"test_size is {options.test_size:g}: give a whole number of rows, or a share below 1")
    if options.test_size and options.split == "test":
        raise InputError("split 'test' cannot hold out a test split of its own: set test_size to 0")
    from spin.alignment.core.parquet import open_parquet
    from spin.alignment.core.provenance import Provenance, hash_text
    from spin.alignment.data.source_files import split_files

    source = Source(options.data, options.split, options.turns, options.skip_invalid)
    local, folder = Path(options.data), Path(options.output_dir)
    if local.is_dir() and local.resolve() == folder.resolve():
        raise InputError(f"output_dir is the folder of the data, {folder}: choose another one")
    paths = {"train": folder / f"{options.split}.parquet"}
    if options.test_size:
        paths["test"] = folder / "test.parquet"
    content = source_hash(split_files(local, options.split)) if local.exists() else hash_text(options.data)
    settings = {
        name: getattr(options, name) for name in ("split", "test_size", "subset", "seed", "turns", "skip_invalid")
    }
    provenance = {
        name: Provenance("prompts", sampling=settings, prompts_hash=content, split=path.stem)
        for name, path in paths.items()
    }
    held_out = stale_test_split(folder, options.split) if "test" not in paths else None
    if held_out is not None and not options.overwrite:
        raise InputError(
            f"{held_out} was held out of an earlier data set: choose another output_dir or pass --overwrite, which removes it"
        )
    if not options.overwrite and already_there(paths, provenance):
        rows = {path.name: open_parquet(path).metadata.num_rows for path in paths.values()}
        print(f"{folder} is complete already: {rows}")
        return
    selection = select(source, options.seed, options.test_size, options.subset)
    write(source, selection, options.seed, paths, provenance)
    if held_out is not None:
        held_out.unlink()
    repeated = selection.num_rows - len(selection.prompts)
    unused = len(selection.prompts) - selection.num_train - selection.num_test
    print(
        f"{selection.num_rows} rows read, {repeated} repeated prompts removed, {len(source.invalid)} invalid rows skipped, "
        f"{unused} left out by --subset; wrote {selection.num_train} training and {selection.num_test} test rows to {folder}"
    )
    for reason in source.invalid[:5]:
        print(f"  skipped: {reason}")


if __name__ == "__main__":
    run_program(main)
