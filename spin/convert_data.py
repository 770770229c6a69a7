"""Step 1.5: shards of generated responses -> preference parquet.

Gathers the fractions of every split in a folder, proves that each prompt and sample is there exactly once, forms pairs
prompt by prompt, and writes ``{split}_prefs-00000-of-0000N.parquet``; ``{split}_prefs.counts.json`` appears last and proves
that the set is whole. Rows stream through; 8 bytes a prompt are held in memory.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.errors import InputError, lookup
from spin.programs import Parser, run_program

if TYPE_CHECKING:
    from spin.alignment.provenance import Provenance

# What may differ between the splits of one run.
_OF_ONE_SPLIT = ("split", "prompts_hash", "num_prompts", "data_frac", "frac_len", "extra")
_FRACTION_NAME = re.compile(r"(?P<split>.+)-(?P<number>\d{5})\.parquet")


def make_parser() -> Parser:
    parser = Parser(prog="convert_data.py", description="Gather generated fractions into preference parquet files.")
    parser.add_argument(
        "--input_dir", required=True, help="folder of {split}-{fraction}.parquet files from generate.py"
    )
    parser.add_argument("--output_dir", required=True, help="folder for {split}_prefs-*.parquet")
    parser.add_argument(
        "--num_fracs", type=int, default=0, help="training fractions that must be there (0: as recorded)"
    )
    parser.add_argument("--pairing", default="ground_truth", help="which response is chosen and which rejected")
    parser.add_argument("--identical", choices=("keep", "drop"), default="keep", help="pairs whose responses are equal")
    parser.add_argument(
        "--truncated", choices=("keep", "drop"), default="keep", help="responses cut by length (no EOS)"
    )
    parser.add_argument("--max_rows_per_file", type=int, default=100_000, help="rows in one output file")
    parser.add_argument("--overwrite", action="store_true", help="replace pairs made from something else")
    return parser


class Gathered:
    """The fractions of one split, checked to be complete, free of repetition and of one provenance."""

    def __init__(self, input_dir: Path, split: str, files: dict[int, Path], num_fracs: int) -> None:
        self.input_dir, self.split, self.files = input_dir, split, files
        self.provenance = self._one_provenance()
        self._check_fractions(num_fracs)
        self.skipped = self._check_rows()

    def _one_provenance(self) -> Provenance:
        from spin.alignment.provenance import read_provenance
        from spin.alignment.shards import open_parquet

        first: tuple[Path, Provenance] | None = None
        for path in self.files.values():
            provenance = read_provenance(open_parquet(path).schema_arrow, path)
            if provenance.kind != "generated":
                raise InputError(
                    f"{path} holds {provenance.kind} rows, not generated ones: give generate.py's output folder"
                )
            first = first or (path, provenance)
            differences = first[1].differences(provenance)
            if differences:
                raise InputError(
                    f"{first[0].name} and {path.name} in {self.input_dir} come from different runs "
                    f"({'; '.join(differences)}): generate one of them again"
                )
        assert first is not None
        return first[1]

    def _check_fractions(self, num_fracs: int) -> None:
        from spin.alignment.fractions import num_fractions

        recorded = num_fractions(self.provenance.num_prompts, self.provenance.frac_len)
        expected = num_fracs if num_fracs and self.split == "train" else recorded
        if expected > recorded:
            raise InputError(
                f"num_fracs is {expected}, but {self.provenance.num_prompts} prompts in pieces of "
                f"{self.provenance.frac_len or 'all'} make {recorded} fractions: correct num_fracs"
            )
        missing = [number for number in range(expected) if number not in self.files]
        if missing:
            numbers = f"{', '.join(map(str, missing))} of {expected} {'is' if len(missing) == 1 else 'are'} missing"
            flags = " and ".join(f"--data_frac {number}" for number in missing[:3]) + (" ..." if missing[3:] else "")
            raise InputError(
                f"{self.split} fraction {numbers} in {self.input_dir}: run generate.py --split {self.split} with {flags}"
            )
        surplus = [self.files[number].name for number in self.files if number >= expected]
        if surplus:
            raise InputError(
                f"{self.input_dir} holds more than {expected} {self.split} fractions ({', '.join(surplus)}): "
                "correct num_fracs or remove them"
            )

    def _check_rows(self) -> list[dict[str, str]]:
        """Check that each fraction holds every prompt x sample once; return the prompts that generation left out."""
        import numpy as np

        from spin.alignment.provenance import hash_text
        from spin.alignment.fractions import fraction_rows
        from spin.alignment.shards import read_skipped

        num_samples = int(self.provenance.sampling.get("num_samples", 1))
        seen, skipped = array("Q"), []
        for number, path in sorted(self.files.items()):
            left_out = read_skipped(path)
            skipped += left_out
            prompts = fraction_rows(self.provenance.num_prompts, number, self.provenance.frac_len)
            found = 0
            for prompt_id, indices in _sample_indices(path):
                if sorted(indices) != list(range(num_samples)):
                    raise InputError(
                        f"{path} holds the samples {sorted(indices)} of prompt {prompt_id} where 0 to {num_samples - 1} are "
                        "expected once each: generate this fraction again"
                    )
                seen.append(int(hash_text(prompt_id), 16))
                found += 1
            if found + len(left_out) != len(prompts):
                raise InputError(
                    f"{path} holds {found} prompts where {len(prompts) - len(left_out)} are expected: generate it again"
                )
        unique, counts = np.unique(np.frombuffer(seen, dtype=np.uint64), return_counts=True)
        if (counts > 1).any():
            self._name_repeated({int(value) for value in unique[counts > 1]})
        return skipped

    def _name_repeated(self, repeated: set[int]) -> None:
        from spin.alignment.provenance import hash_text

        places = [
            (prompt_id, path.name)
            for path in self.files.values()
            for prompt_id, _ in _sample_indices(path)
            if int(hash_text(prompt_id), 16) in repeated
        ]
        prompt_id, names = places[0][0], [name for found, name in places if found == places[0][0]]
        raise InputError(
            f"prompt {prompt_id} stands more than once, in {' and '.join(names)}: generate one of them again"
        )

    def prompts(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Stream (prompt id, its rows), fraction by fraction."""
        from spin.alignment.shards import read_rows

        for _, path in sorted(self.files.items()):
            for prompt_id, rows in groupby(read_rows(path), key=lambda row: row["prompt_id"]):
                yield prompt_id, list(rows)


def _sample_indices(path: Path) -> Iterator[tuple[str, list[int]]]:
    from spin.alignment.shards import open_parquet, read_rows

    missing = {"prompt_id", "sample_index", "chosen", "rejected", "rejected_token_ids"} - set(
        open_parquet(path).schema_arrow.names
    )
    if missing:
        raise InputError(f"{path} lacks the columns {', '.join(sorted(missing))}: generate it again")
    rows = read_rows(path, 8192, ["prompt_id", "sample_index"])
    for prompt_id, group in groupby(rows, key=lambda row: row["prompt_id"]):
        yield prompt_id, [row["sample_index"] for row in group]


class PreferenceFiles:
    """The numbered output files of one split: written under hidden names, and named when all of them are there."""

    def __init__(self, folder: Path, split: str, provenance: Provenance, rows_per_file: int) -> None:
        self.folder, self.split, self.provenance, self.rows_per_file = folder, split, provenance, rows_per_file
        self.counts_path = folder / f"{split}_prefs.counts.json"
        self.hidden: list[Path] = []

    def discard(self) -> None:
        """Remove hidden files, also those of a killed run."""
        from spin.alignment.shards import remove_files, remove_leftovers

        remove_leftovers(self.counts_path)
        remove_files(self.folder.glob(f".*{self.split}_prefs-*.part*"))
        self.hidden = []

    def write(self, rows: Iterator[dict[str, Any]]) -> int:
        """Stream all rows into hidden files; return how many there were."""
        from spin.alignment.data import PREFERENCE_SCHEMA
        from spin.alignment.shards import ParquetSink

        total = 0
        while first := next(rows, None):
            path = self.folder / f".{self.split}_prefs-{len(self.hidden):05d}.part"
            rows_of_file = chain([first], islice(rows, self.rows_per_file - 1))
            with ParquetSink(path, PREFERENCE_SCHEMA, self.provenance) as sink:
                while batch := list(islice(rows_of_file, 1000)):
                    sink.write(batch)
            total += sink.num_rows
            self.hidden.append(path)
        return total

    def withdraw(self) -> None:
        """Remove the set of an earlier conversion, its proof of completion first."""
        from spin.alignment.shards import remove_files

        remove_files([self.counts_path, *self.folder.glob(f"{self.split}_prefs-*.parquet")])

    def publish(self, counts: dict[str, int]) -> None:
        """Give the hidden files their names. A crash in between leaves a set that readers refuse and a rerun replaces."""
        from spin.alignment.shards import fsync_folder, write_json_atomic

        for number, path in enumerate(self.hidden):
            path.rename(self.folder / f"{self.split}_prefs-{number:05d}-of-{len(self.hidden):05d}.parquet")
        fsync_folder(self.folder)
        write_json_atomic(self.counts_path, counts)

    def is_whole(self) -> bool:
        """Return whether the set is there with its proof of completion."""
        files = list(self.folder.glob(f"{self.split}_prefs-*.parquet"))
        return self.counts_path.exists() and bool(files) and len(files) == int(files[0].stem[-5:])


def pair_rows(gathered: Gathered, options: Any, counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Stream the preference rows of a split, counting what is kept and dropped."""
    from spin.alignment.pairing import PAIRINGS

    pairing = PAIRINGS[options.pairing]
    for _, rows in gathered.prompts():
        counts["rows"] += len(rows)
        for pair in pairing(rows):
            identical = pair["chosen"][-1]["content"].strip() == pair["rejected"][-1]["content"].strip()
            truncated = pair["rejected_finish_reason"] == "length"
            counts["identical"] += identical
            counts["truncated"] += truncated
            if (identical and options.identical == "drop") or (truncated and options.truncated == "drop"):
                counts["dropped"] += 1
                continue
            yield pair


def make_provenance(gathered: Gathered, options: Any) -> Provenance:
    """Return the record of the pairs: the generator's, with a hash of it and the settings of this step."""
    from dataclasses import asdict, replace

    from spin.alignment.provenance import hash_json

    origin = asdict(gathered.provenance) | {"data_frac": 0}
    settings = {name: getattr(options, name) for name in ("pairing", "identical", "truncated", "max_rows_per_file")}
    extra = {"generated_hash": hash_json(origin), "fractions": len(gathered.files), **settings}
    return replace(gathered.provenance, kind="preferences", data_frac=0, extra=extra)


def convert(gathered: Gathered, files: PreferenceFiles, options: Any) -> dict[str, int]:
    """Write the hidden files of one split; return its counts.

    Raises:
        InputError: no pair is left.
    """
    counts = {"rows": 0, "identical": 0, "truncated": 0, "dropped": 0, "skipped": len(gathered.skipped)}
    counts["written"] = files.write(pair_rows(gathered, options, counts))
    if not counts["written"]:
        raise InputError(
            f"no pair of the split '{gathered.split}' is left ({counts['identical']} identical, {counts['truncated']} cut by "
            "length): pass --identical keep or --truncated keep, or sample at a higher temperature"
        )
    return counts


def check_one_run(splits: Sequence[Gathered]) -> None:
    """Refuse splits that come from different models, tokenizers or sampling settings."""
    for other in splits[1:]:
        differences = splits[0].provenance.differences(other.provenance, ignore=_OF_ONE_SPLIT)
        if differences:
            raise InputError(
                f"the splits {splits[0].split} and {other.split} in {other.input_dir} come from different runs "
                f"({'; '.join(differences)}): generate one of them again"
            )


def check_output(folder: Path, sets: dict[str, PreferenceFiles], overwrite: bool) -> None:
    """Refuse a folder that holds pairs made from something else; ``overwrite`` allows it for the splits to be written.

    Raises:
        InputError: naming the file and what differs.
    """
    from spin.alignment.provenance import read_provenance
    from spin.alignment.shards import open_parquet

    for path in sorted(folder.glob("*_prefs-*.parquet")):
        own = sets.get(path.name.rpartition("_prefs-")[0])
        if own and overwrite:
            continue
        wanted = (own or next(iter(sets.values()))).provenance
        found = read_provenance(open_parquet(path).schema_arrow, path)
        differences = wanted.differences(found, ignore=() if own else _OF_ONE_SPLIT)
        if differences:
            mend = "pass --overwrite" if own else "remove it"
            raise InputError(
                f"{path} was made from something else ({'; '.join(differences)}): choose another output_dir or {mend}"
            )


def show_counts(counts: dict[str, dict[str, int]]) -> None:
    """Print one line a split: its rows, and what became of them."""
    names = list(next(iter(counts.values())))
    width = max(map(len, ("split", *counts))) + 1
    print("split".ljust(width) + "".join(name.rjust(11) for name in names))
    for split, values in counts.items():
        print(split.ljust(width) + "".join(str(values[name]).rjust(11) for name in names))


def find_splits(input_dir: Path) -> dict[str, dict[int, Path]]:
    """Return the fraction files of each split in a folder, by number."""
    splits: dict[str, dict[int, Path]] = {}
    for path in sorted(input_dir.glob("*.parquet")):
        name = _FRACTION_NAME.fullmatch(path.name)
        if name:
            splits.setdefault(name["split"], {})[int(name["number"])] = path
    if not splits:
        raise InputError(f"{input_dir} holds no fraction files such as train-00000.parquet: run spin/generate.py first")
    return splits


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    if options.num_fracs < 0 or options.max_rows_per_file < 1:
        raise InputError("num_fracs must be 0 or more and max_rows_per_file at least 1: correct the flag")
    from spin.alignment.pairing import PAIRINGS
    from spin.alignment.shards import read_json

    lookup(PAIRINGS, options.pairing, "pairing")
    input_dir, output_dir = Path(options.input_dir), Path(options.output_dir)
    if not input_dir.is_dir():
        raise InputError(f"input_dir {input_dir} does not exist: give the output folder of spin/generate.py")
    if input_dir.resolve() == output_dir.resolve():
        raise InputError(f"output_dir is the input_dir {input_dir}: choose another folder")
    splits = [Gathered(input_dir, split, files, options.num_fracs) for split, files in find_splits(input_dir).items()]
    check_one_run(splits)
    sets = {
        item.split: PreferenceFiles(output_dir, item.split, make_provenance(item, options), options.max_rows_per_file)
        for item in splits
    }
    check_output(output_dir, sets, options.overwrite)
    if not options.overwrite and all(files.is_whole() for files in sets.values()):
        print(f"{output_dir} is complete already")
        show_counts({split: read_json(files.counts_path) for split, files in sets.items()})
        return
    show_counts(write_sets(splits, sets, options))
    for item in (skipped for gathered in splits for skipped in gathered.skipped[:5]):
        print(f"  skipped by generation: {item['prompt_id']} ({item['reason']})")


def write_sets(splits: Sequence[Gathered], sets: dict[str, PreferenceFiles], options: Any) -> dict[str, dict[str, int]]:
    """Write the pairs of all splits, then name them; return the counts. An error leaves the earlier pairs as they were."""
    try:
        for files in sets.values():
            files.discard()
        counts = {item.split: convert(item, sets[item.split], options) for item in splits}
    except BaseException:
        for files in sets.values():
            files.discard()
        raise
    for files in sets.values():
        files.withdraw()
    for split, files in sets.items():
        files.publish(counts[split])
    return counts


if __name__ == "__main__":
    run_program(main)
