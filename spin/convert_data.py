"""Step 1.5: shards of generated responses -> preference parquet.

Gathers the fractions of every split in a folder, proves that each prompt and sample is there exactly once, forms pairs
prompt by prompt, and writes ``{split}_prefs-00000-of-0000N.parquet`` with ``{split}_prefs.counts.json`` beside it. Rows stream
through; 8 bytes a prompt are held in memory.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.errors import InputError, lookup
from spin.programs import Parser, run_program

if TYPE_CHECKING:
    from spin.alignment.provenance import Provenance

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
        from spin.alignment.shards import num_fractions

        recorded = num_fractions(self.provenance.num_prompts, self.provenance.frac_len)
        expected = num_fracs if num_fracs and self.split == "train" else recorded
        if expected > recorded:
            raise InputError(
                f"num_fracs is {expected}, but {self.provenance.num_prompts} prompts in pieces of "
                f"{self.provenance.frac_len or 'all'} make {recorded} fractions: correct num_fracs"
            )
        missing = [number for number in range(expected) if number not in self.files]
        if missing:
            raise InputError(
                f"{self.input_dir} lacks the {self.split} fractions {', '.join(map(str, missing))} of {expected}: "
                f"run generate.py with --split {self.split} --data_frac {missing[0]}"
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
        from spin.alignment.shards import fraction_rows, read_skipped

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
    from spin.alignment.shards import open_parquet

    file = open_parquet(path)
    missing = {"prompt_id", "sample_index", "chosen", "rejected", "rejected_token_ids"} - set(file.schema_arrow.names)
    if missing:
        raise InputError(f"{path} lacks the columns {', '.join(sorted(missing))}: generate it again")
    rows = (
        row
        for batch in file.iter_batches(columns=["prompt_id", "sample_index"], batch_size=8192)
        for row in batch.to_pylist()
    )
    for prompt_id, group in groupby(rows, key=lambda row: row["prompt_id"]):
        yield prompt_id, [row["sample_index"] for row in group]


class PreferenceFiles:
    """Numbered output files that appear together: written under hidden names, renamed when their number is known."""

    def __init__(self, folder: Path, split: str, provenance: Provenance, rows_per_file: int) -> None:
        from spin.alignment.data import PREFERENCE_SCHEMA
        from spin.alignment.shards import remove_files

        self.folder, self.split, self.provenance = folder, split, provenance
        self.rows_per_file, self.schema = rows_per_file, PREFERENCE_SCHEMA
        self.hidden: list[Path] = []
        remove_files(folder.glob(f".{split}_prefs-*.part"))

    def write(self, rows: Iterator[dict[str, Any]]) -> int:
        """Stream all rows into hidden files; return how many there were."""
        from spin.alignment.shards import ParquetSink

        total, pending = 0, next(rows, None)
        while pending is not None:
            path = self.folder / f".{self.split}_prefs-{len(self.hidden):05d}.part"
            with ParquetSink(path, self.schema, self.provenance) as sink:
                batch: list[dict[str, Any]] = []
                while pending is not None and sink.num_rows + len(batch) < self.rows_per_file:
                    batch.append(pending)
                    pending = next(rows, None)
                    if len(batch) == 1000:
                        sink.write(batch)
                        batch = []
                sink.write(batch)
            total += sink.num_rows
            self.hidden.append(path)
        return total

    def publish(self) -> None:
        """Remove the files of an earlier conversion and give the new ones their names.

        A crash in between leaves an incomplete set, which every reader refuses and the next run replaces.
        """
        from spin.alignment.shards import fsync_folder, remove_files

        remove_files(self.folder.glob(f"{self.split}_prefs-*.parquet"))
        for number, path in enumerate(self.hidden):
            path.rename(self.folder / f"{self.split}_prefs-{number:05d}-of-{len(self.hidden):05d}.parquet")
        fsync_folder(self.folder)


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


def convert(gathered: Gathered, output_dir: Path, options: Any) -> dict[str, int]:
    """Write the preference files of one split and its counts.

    Raises:
        InputError: no pair is left.
    """
    from dataclasses import asdict, replace

    from spin.alignment.provenance import hash_json
    from spin.alignment.shards import write_json_atomic

    counts = {"rows": 0, "identical": 0, "truncated": 0, "dropped": 0, "skipped": len(gathered.skipped)}
    origin = asdict(gathered.provenance) | {"data_frac": 0}
    settings = {name: getattr(options, name) for name in ("pairing", "identical", "truncated")}
    provenance = replace(
        gathered.provenance, kind="preferences", data_frac=0, extra={"generated_hash": hash_json(origin), **settings}
    )
    files = PreferenceFiles(output_dir, gathered.split, provenance, options.max_rows_per_file)
    counts["written"] = files.write(pair_rows(gathered, options, counts))
    if not counts["written"]:
        raise InputError(
            f"no pair of the split '{gathered.split}' is left ({counts['identical']} identical, {counts['truncated']} cut by "
            "length): pass --identical keep or --truncated keep, or sample at a higher temperature"
        )
    files.publish()
    write_json_atomic(output_dir / f"{gathered.split}_prefs.counts.json", counts)
    return counts


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

    lookup(PAIRINGS, options.pairing, "pairing")
    input_dir, output_dir = Path(options.input_dir), Path(options.output_dir)
    if not input_dir.is_dir():
        raise InputError(f"input_dir {input_dir} does not exist: give the output folder of spin/generate.py")
    splits = [Gathered(input_dir, split, files, options.num_fracs) for split, files in find_splits(input_dir).items()]
    if input_dir.resolve() == output_dir.resolve():
        raise InputError(f"output_dir is the input_dir {input_dir}: choose another folder")
    for gathered in splits:
        counts = convert(gathered, output_dir, options)
        print(f"{gathered.split}: " + ", ".join(f"{value} {name}" for name, value in counts.items()))
        for item in gathered.skipped[:5]:
            print(f"  skipped by generation: {item['prompt_id']} ({item['reason']})")


if __name__ == "__main__":
    run_program(main)
