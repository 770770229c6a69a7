"""Generated fractions to preference files: pairing, selection, progress."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say, say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.program import Parser

if TYPE_CHECKING:
    from spin.alignment.core.provenance import Provenance
    from spin.alignment.pairs.gather import Split
    from spin.alignment.pairs.preference_files import PreferenceFiles, Selection

PROGRESS_SECONDS = 10.0


def make_parser() -> Parser:
    from spin.alignment.pairs.annotate import add_scorer_flags

    parser = Parser(prog="convert_data.py", description="Gather generated fractions into preference parquet files.")
    add = parser.add_argument
    add("--input_dir", required=True, help="folder of {split}-{fraction}.parquet files from generate.py")
    add("--output_dir", required=True, help="folder for {split}_prefs-*.parquet")
    add("--splits", nargs="+", action="extend", help="splits to gather (default: those found at the start)")
    add("--num_fracs", type=int, default=0, help="training fractions that must be there (0: as recorded)")
    add(
        "--wait",
        type=float,
        default=0.0,
        help="gather while fractions are still being made; end after this many seconds without a new one (0: do not wait)",
    )
    add(
        "--pairing",
        default="ground_truth",
        help="which response is chosen and which rejected: a name, or module:function",
    )
    add(
        "--initial",
        default=None,
        help="folder of the initial model's responses to the same prompts: a third response, for the losses that read one",
    )
    add_scorer_flags(add)
    add("--identical", choices=("keep", "drop"), default="keep", help="pairs whose responses are equal")
    add("--truncated", choices=("keep", "drop"), default="keep", help="responses cut by length (no EOS)")
    add("--max_rows_per_file", type=int, default=100_000, help="rows in one output file")
    add("--overwrite", action="store_true", help="replace pairs made from something else")
    return parser


def check_flags(options: Any) -> None:
    """Check everything that the flags say, scorer and pairing included; no file of the data is looked at."""
    from spin.alignment.pairs.annotate import scorer_settings

    if options.num_fracs < 0 or options.max_rows_per_file < 1:
        raise InputError("num_fracs must be 0 or more and max_rows_per_file at least 1: correct the flag")
    if not 0 <= options.wait < float("inf"):
        raise InputError(f"wait is {options.wait}: set it to 0 (do not wait) or to a number of seconds")
    scorer_settings(options)


def check_options(options: Any) -> None:
    """Check every flag and both folders before a file is opened."""
    check_flags(options)
    input_dir, output_dir = Path(options.input_dir), Path(options.output_dir)
    if not input_dir.is_dir():
        raise InputError(f"input_dir {input_dir} does not exist: give the output folder of spin/generate.py")
    if input_dir.resolve() == output_dir.resolve():
        raise InputError(f"output_dir is the input_dir {input_dir}: choose another folder")
    if options.initial is not None and not Path(options.initial).is_dir():
        raise InputError(
            f"initial is {options.initial}, which is no folder: give the output folder of spin/generate.py"
        )


def find_splits(options: Any) -> list[Split]:
    """Return the splits to gather, by name, with the headers of what is there checked."""
    from spin.alignment.pairs.gather import Split, find_fractions

    folder = Path(options.input_dir)
    names = sorted(set(options.splits or find_fractions(folder)))
    if not names:
        mend = "pass --splits to wait for them" if options.wait else "run spin/generate.py first"
        raise InputError(f"{folder} holds no fraction files such as train-00000.parquet: {mend}")
    splits = [Split(folder, name, options.num_fracs, patient=options.wait > 0) for name in names]
    for split in splits:
        split.survey()
    check_one_run(splits)
    return splits


def make_provenance(split: Split, options: Any) -> Provenance:
    """Return the record of the pairs: the generator's, with a hash of it and the settings of this step."""
    from dataclasses import asdict

    from spin.alignment.core.provenance import hash_json
    from spin.alignment.core.resolve import module_record
    from spin.alignment.pairs.annotate import scorer_record, scorer_settings
    from spin.alignment.pairs.fraction_file import ID_SUMS
    from spin.alignment.pairs.initial import initial_record

    assert split.origin is not None
    made = split.origin.provenance
    facts = {name: value for name, value in made.extra.items() if name not in ID_SUMS}
    origin = asdict(made) | {"data_frac": 0, "extra": facts}
    settings = {name: getattr(options, name) for name in ("pairing", "identical", "truncated", "max_rows_per_file")}
    scorer = scorer_settings(options)
    scored = scorer_record(scorer) if scorer is not None else {}
    own = module_record("pairing", options.pairing)
    if options.initial is not None:
        own |= initial_record(Path(options.initial), split.name, made)
    extra = {"generated_hash": hash_json(origin), "fractions": split.total, **settings, **own, **scored}
    return replace(made, kind="preferences", data_frac=0, extra=extra)


def make_files(split: Split, options: Any) -> PreferenceFiles:
    """Return the output files of a split whose fraction 0 has been seen.

    Raises:
        InputError: the pairing cannot work with this many responses to a prompt.
    """
    from spin.alignment.methods.pairings import check_num_samples, find_pairing
    from spin.alignment.pairs.initial import with_initial
    from spin.alignment.pairs.preference_files import COUNTS, EVEN_COUNTS, SCORED_COUNTS, PreferenceFiles, pair_schema

    assert split.origin is not None
    pairing = find_pairing(options.pairing)
    check_num_samples(options.pairing, pairing, split.origin.num_samples)
    schema = pair_schema(pairing, split.origin.schema)
    schema = schema if options.initial is None else with_initial(schema)
    counts: tuple[str, ...] = COUNTS
    if pairing.needs:
        counts = EVEN_COUNTS if pairing.even else SCORED_COUNTS
    folder, provenance = Path(options.output_dir), make_provenance(split, options)
    return PreferenceFiles(folder, split.name, provenance, schema, options.max_rows_per_file, counts)


def check_one_run(splits: Sequence[Split]) -> None:
    """Refuse splits that come from different models, tokenizers or sampling settings."""
    from spin.alignment.pairs.gather import OF_ONE_SPLIT

    known = [(split, split.reference.provenance) for split in splits if split.reference]
    for split, provenance in known[1:]:
        differences = known[0][1].differences(provenance, ignore=OF_ONE_SPLIT)
        if differences:
            raise InputError(
                f"the splits {known[0][0].name} and {split.name} in {split.folder} come from different runs "
                f"({'; '.join(differences)}): generate one of them again"
            )


def check_output(folder: Path, sets: dict[str, PreferenceFiles], splits: Sequence[Split], overwrite: bool) -> None:
    """Refuse a folder that holds pairs made from something else; ``overwrite`` allows it for the splits to be written.

    Splits of which nothing is known yet are left for later.

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
            mend = "pass --overwrite" if own else "remove it"
            raise InputError(
                f"{path} was made from something else ({'; '.join(differences)}): choose another output_dir or {mend}"
            )


def show_counts(counts: dict[str, dict[str, int]]) -> None:
    """Print one line a split: its rows, and what became of them."""
    names = list(next(iter(counts.values())))
    width = max(map(len, ("split", *counts))) + 1
    say("split".ljust(width) + "".join(name.rjust(11) for name in names))
    for split, values in counts.items():
        say(split.ljust(width) + "".join(str(values[name]).rjust(11) for name in names))


class Progress:
    """Says every ten seconds how many rows have passed, and how fast."""

    def __init__(self) -> None:
        self.rows, self._said_rows, self._said = 0, 0, time.monotonic()

    def add(self, split: str, rows: int) -> None:
        self.rows += rows
        passed = time.monotonic() - self._said
        if passed >= PROGRESS_SECONDS:
            say_error(f"{self.rows:,} rows, {(self.rows - self._said_rows) / passed:,.0f} rows/s (now {split})")
            self._said_rows, self._said = self.rows, time.monotonic()


@contextmanager
def make_selection(options: Any) -> Iterator[Selection]:
    """Yield what forms the pairs; its scorer, where there is one, is closed afterwards."""
    from spin.alignment.methods.pairings import find_pairing
    from spin.alignment.pairs.annotate import Labeller, scorer_settings
    from spin.alignment.pairs.preference_files import Selection
    from spin.alignment.rewards import make_scorer

    settings = scorer_settings(options)
    selection = Selection(find_pairing(options.pairing), options.identical == "drop", options.truncated == "drop")
    if settings is None:
        yield selection
        return
    with closing(make_scorer(settings)) as scorer:
        yield replace(selection, labeller=Labeller(scorer))


def write_hidden(splits: Sequence[Split], sets: dict[str, PreferenceFiles], options: Any) -> None:
    """Write the pairs of all splits under hidden names, and prove them complete; late splits are added to ``sets``.

    Raises:
        InputError: the proof fails, a fraction did not come in time, or no pair is left.
    """
    from spin.alignment.pairs.gather import arriving
    from spin.alignment.pairs.initial import InitialResponses

    initial: dict[str, InitialResponses] = {}
    progress = Progress()
    for files in sets.values():
        files.discard()
    with make_selection(options) as selection:
        for split, fraction in arriving(splits, options.wait, say_error):
            if split.name not in sets:
                sets[split.name] = make_files(split, options)
                check_one_run(splits)
                check_output(Path(options.output_dir), sets, splits, options.overwrite)
                sets[split.name].discard()
            files = sets[split.name]
            if options.initial is not None and split.name not in initial:
                initial[split.name] = InitialResponses(Path(options.initial), split.name)
            forming = replace(selection, initial=initial.get(split.name))
            for batch in split.read(fraction):
                files.write(forming.apply(batch, fraction.num_samples, files.counts))
                progress.add(split.name, batch.num_rows)
    for split in splits:
        split.conclude()
        finish(split, sets[split.name])


def finish(split: Split, files: PreferenceFiles) -> None:
    """Close the last hidden file of a split that was proven complete."""
    files.finish()
    files.counts["skipped"] = split.num_skipped
    if not files.counts["written"]:
        counts = files.counts
        scored = f", {counts['ties']} prompts tied, {counts['failed']} scores failed" if "ties" in counts else ""
        raise InputError(
            f"no pair of the split '{split.name}' is left ({counts['identical']} identical, "
            f"{counts['truncated']} cut by length{scored}): pass --identical keep or --truncated keep, or sample at a higher "
            "temperature"
        )


def write_sets(splits: Sequence[Split], sets: dict[str, PreferenceFiles], options: Any) -> None:
    """Write the pairs of all splits, then name them. An error on the way leaves the earlier pairs as they were."""
    try:
        write_hidden(splits, sets, options)
    except BaseException:
        for files in sets.values():
            files.discard()
        raise
    for files in sets.values():
        files.withdraw()
    for split in splits:
        sets[split.name].publish()
