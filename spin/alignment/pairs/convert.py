"""Converts generated fractions to preference files: pairing, selection, progress."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say, say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.settings import recorded

if TYPE_CHECKING:
    from spin.alignment.core.provenance import Provenance
    from spin.alignment.pairs.config import ConvertConfig
    from spin.alignment.pairs.gather import Split
    from spin.alignment.pairs.preference_files import PreferenceFiles, Selection

PROGRESS_SECONDS = 10.0


def convert(config: ConvertConfig) -> dict[str, dict[str, int]]:
    """Gather the fractions of every split, form pairs and write them; return the counts of each split.

    Raises:
        InputError: a setting, a folder or a fraction cannot be used; nothing is written.
    """
    from spin.alignment.core.lock import folder_lock
    from spin.alignment.data.data_card import write_data_card
    from spin.alignment.pairs.annotate import scorer_settings
    from spin.alignment.pairs.counts import counts_of_folder

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "convert_data.py was started in several processes, but it scores on all GPUs of the machine in one: start it with "
            "python spin/convert_data.py"
        )
    scorer_settings(config)
    config.check_files()
    output_dir = Path(config.output_dir)
    splits = find_splits(config)
    sets = {split.name: make_files(split, config) for split in splits if split.origin}
    check_output(output_dir, sets, splits, config.overwrite)
    complete = not config.overwrite and len(sets) == len(splits) and all(files.is_complete() for files in sets.values())
    if complete and (counts := finished_counts(sets)):
        say(f"{output_dir} is already complete")
        show_counts(counts)
        write_data_card(output_dir, counts_of_folder(output_dir))  # an interrupted conversion may have left none
        return counts
    with folder_lock(output_dir, setting="output_dir"):
        write_sets(splits, sets, config)
        write_data_card(output_dir, counts_of_folder(output_dir))
    counts = {split.name: sets[split.name].counts for split in splits}
    show_counts(counts)
    for item in (skipped for split in splits for skipped in split.skipped):
        say(f"  skipped by generation: {item['prompt_id']} ({item['reason']})")
    return counts


def finished_counts(sets: dict[str, PreferenceFiles]) -> dict[str, dict[str, int]]:
    """Return the counts of complete splits; nothing, once it is said, if one of the files is damaged."""
    from spin.alignment.pairs.counts import read_counts

    found = {}
    for split, files in sets.items():
        try:
            found[split] = read_counts(files.counts_path)
        except InputError:
            found[split] = {}
        if found[split].keys() != files.counts.keys():
            say_error(f"{files.counts_path} is damaged: the pairs are written again")
            return {}
    return found


def find_splits(config: ConvertConfig) -> list[Split]:
    """Return the splits to gather, sorted by name, with the headers of their existing fractions checked."""
    from spin.alignment.pairs.gather import Split, find_fractions

    folder = Path(config.input_dir)
    names = sorted(set(config.splits or find_fractions(folder)))
    if not names:
        fix = "pass --splits to wait for them" if config.wait else "run spin/generate.py first"
        raise InputError(f"{folder} contains no fraction files such as train-00000.parquet: {fix}")
    splits = [Split(folder, name, config.num_fracs, patient=config.wait > 0) for name in names]
    for split in splits:
        split.survey()
    check_one_run(splits)
    return splits


def make_provenance(split: Split, config: ConvertConfig) -> Provenance:
    """Return the provenance of the pairs: that of the responses, a hash of it, and the settings of this step."""
    from dataclasses import asdict

    from spin.alignment.core.provenance import hash_json
    from spin.alignment.core.resolve import module_record
    from spin.alignment.methods.pairings import find_pairing
    from spin.alignment.pairs.annotate import scorer_record, scorer_settings
    from spin.alignment.pairs.fraction_file import ID_SUMS
    from spin.alignment.pairs.initial import initial_record

    assert split.origin is not None
    made = split.origin.provenance
    # ID_SUMS and the fraction number differ between the fractions of one generation, so its hash leaves them out.
    facts = {name: value for name, value in made.extra.items() if name not in ID_SUMS}
    origin = asdict(made) | {"data_frac": 0, "extra": facts}
    scorer = scorer_settings(config)
    scored = scorer_record(scorer) if scorer is not None else {}
    own: dict[str, Any] = module_record("pairing", config.pairing)
    if not find_pairing(config.pairing).prefers:
        own["prefers"] = False
    if config.initial is not None:
        own |= initial_record(Path(config.initial), split.name, made)
    extra = {"generated_hash": hash_json(origin), "fractions": split.total, **recorded(config), **own, **scored}
    return replace(made, kind="preferences", data_frac=0, extra=extra)


def make_files(split: Split, config: ConvertConfig) -> PreferenceFiles:
    """Return the output files of a split whose fraction 0 has been seen.

    Raises:
        InputError: the pairing does not support this many responses per prompt.
    """
    from spin.alignment.methods.pairings import check_num_samples, find_pairing
    from spin.alignment.pairs.counts import COUNTS, EVEN_COUNTS, SCORED_COUNTS
    from spin.alignment.pairs.initial import with_initial
    from spin.alignment.pairs.preference_files import PreferenceFiles, pair_schema

    assert split.origin is not None
    pairing = find_pairing(config.pairing)
    check_num_samples(config.pairing, pairing, split.origin.num_samples)
    schema = pair_schema(pairing, split.origin.schema)
    schema = schema if config.initial is None else with_initial(schema)
    counts: tuple[str, ...] = COUNTS
    if pairing.needs:
        counts = EVEN_COUNTS if pairing.counts_unpaired else SCORED_COUNTS
    folder, provenance = Path(config.output_dir), make_provenance(split, config)
    return PreferenceFiles(folder, split.name, provenance, schema, config.max_rows_per_file, counts)


def check_one_run(splits: Sequence[Split]) -> None:
    """Refuse splits that come from different models, tokenizers or sampling settings."""
    from spin.alignment.pairs.gather import OF_ONE_SPLIT

    known = [(split, split.reference.provenance) for split in splits if split.reference]
    for split, provenance in known[1:]:
        differences = known[0][1].differences(provenance, ignore=OF_ONE_SPLIT)
        if differences:
            raise InputError(
                f"the splits {known[0][0].name} and {split.name} in {split.folder} come from different runs "
                f"({'; '.join(differences)}): regenerate one of them"
            )


def check_output(folder: Path, sets: dict[str, PreferenceFiles], splits: Sequence[Split], overwrite: bool) -> None:
    """Refuse a folder with pairs from other inputs or settings; ``overwrite`` allows it for the splits to be written.

    Splits without a fraction so far are checked when their first one arrives.

    Raises:
        InputError: naming the file and what differs.
    """
    from spin.alignment.core.parquet import open_parquet
    from spin.alignment.core.provenance import read_provenance
    from spin.alignment.pairs.gather import OF_ONE_SPLIT

    later = {split.name for split in splits} - sets.keys()
    for path in sorted(folder.glob("*_prefs-*.parquet")) if sets else ():
        name = path.name.rpartition("_prefs-")[0]
        own = sets.get(name)
        if name in later or (own and overwrite):
            continue
        wanted = (own or next(iter(sets.values()))).provenance
        found = read_provenance(open_parquet(path).schema_arrow, path)
        differences = wanted.differences(found, ignore=() if own else OF_ONE_SPLIT)
        if differences:
            fix = "pass --overwrite" if own else "remove it"
            raise InputError(
                f"{path} was created from other inputs ({'; '.join(differences)}): choose another output_dir or {fix}"
            )


def show_counts(counts: dict[str, dict[str, int]]) -> None:
    """Print one line per split: its rows by outcome."""
    names = list(next(iter(counts.values())))
    width = max(map(len, ("split", *counts))) + 1
    say("split".ljust(width) + "".join(name.rjust(11) for name in names))
    for split, values in counts.items():
        say(split.ljust(width) + "".join(str(values[name]).rjust(11) for name in names))


class Progress:
    """Reports the number of rows and the rate every ten seconds."""

    def __init__(self) -> None:
        self.rows, self._said_rows, self._said = 0, 0, time.monotonic()

    def add(self, split: str, rows: int) -> None:
        self.rows += rows
        passed = time.monotonic() - self._said
        if passed >= PROGRESS_SECONDS:
            say_error(f"{self.rows:,} rows, {(self.rows - self._said_rows) / passed:,.0f} rows/s (now {split})")
            self._said_rows, self._said = self.rows, time.monotonic()


@contextmanager
def make_selection(config: ConvertConfig) -> Iterator[Selection]:
    """Yield the selection that forms the pairs; its scorer, if it has one, is closed afterwards."""
    from spin.alignment.methods.pairings import find_pairing
    from spin.alignment.pairs.annotate import Labeller, scorer_settings
    from spin.alignment.pairs.preference_files import Selection
    from spin.alignment.rewards import make_scorer

    settings = scorer_settings(config)
    selection = Selection(find_pairing(config.pairing), config.identical == "drop", config.truncated == "drop")
    if settings is None:
        yield selection
        return
    with closing(make_scorer(settings)) as scorer:
        yield replace(selection, labeller=Labeller(scorer))


def write_hidden(splits: Sequence[Split], sets: dict[str, PreferenceFiles], config: ConvertConfig) -> None:
    """Write the pairs of all splits under hidden names and check completeness; late splits are added to ``sets``.

    Raises:
        InputError: prompts or samples are missing, a fraction did not arrive in time, or no pair remains.
    """
    from spin.alignment.pairs.gather import arriving
    from spin.alignment.pairs.initial import InitialResponses

    initial: dict[str, InitialResponses] = {}
    progress = Progress()
    for files in sets.values():
        files.discard()
    with make_selection(config) as selection:
        for split, fraction in arriving(splits, config.wait, say_error):
            if split.name not in sets:
                sets[split.name] = make_files(split, config)
                check_one_run(splits)
                check_output(Path(config.output_dir), sets, splits, config.overwrite)
                sets[split.name].discard()
            files = sets[split.name]
            if config.initial is not None and split.name not in initial:
                initial[split.name] = InitialResponses(Path(config.initial), split.name)
            forming = replace(selection, initial=initial.get(split.name))
            for batch in split.read(fraction):
                files.write(forming.apply(batch, fraction.num_samples, files.counts))
                progress.add(split.name, batch.num_rows)
    for split in splits:
        split.conclude()
        finish(split, sets[split.name])


def finish(split: Split, files: PreferenceFiles) -> None:
    """Close the last hidden file of a split that is known to be complete."""
    files.finish()
    files.counts["skipped"] = split.num_skipped
    if not files.counts["written"]:
        counts = files.counts
        scored = f", {counts['ties']} prompts tied, {counts['failed']} scores failed" if "ties" in counts else ""
        raise InputError(
            f"no pair of the split '{split.name}' remains ({counts['identical']} identical, "
            f"{counts['truncated']} truncated{scored}): pass --identical keep or --truncated keep, or sample at a higher "
            "temperature"
        )


def write_sets(splits: Sequence[Split], sets: dict[str, PreferenceFiles], config: ConvertConfig) -> None:
    """Write the pairs of all splits under hidden names, then publish them; an error before that keeps earlier pairs."""
    try:
        write_hidden(splits, sets, config)
    except BaseException:
        for files in sets.values():
            files.discard()
        raise
    # All old sets go before the first new one appears: a crash in between must not leave a mixture that looks complete.
    for files in sets.values():
        files.withdraw()
    for split in splits:
        sets[split.name].publish()
