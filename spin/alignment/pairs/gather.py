"""Gathering the fractions of a split: each is read once and proven complete, in constant memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import open_parquet
from spin.alignment.core.provenance import id_number
from spin.alignment.data.fractions import fraction_path, num_fractions
from spin.alignment.pairs.diagnose import diagnose_fraction, repeated_prompt
from spin.alignment.pairs.fraction_file import Fraction, prompt_ids

FRACTION_NAME = re.compile(r"(?P<split>.+)-(?P<number>\d{5,})\.parquet")
# The fields of the provenance that may differ between the splits of one run.
OF_ONE_SPLIT = ("split", "prompts_hash", "num_prompts", "data_frac", "frac_len", "extra")
_POLL_SECONDS = 2.0
_REPORT_SECONDS = 60.0
_EXAMPLES = 5  # skipped prompts kept to be shown


class Split:
    """The fractions of one split in a folder, taken in the order of their numbers.

    Attributes:
        patient: fractions may still arrive, so one that is missing or not yet readable is not an error.
        reference: the first fraction seen; all others must agree with it.
        origin: fraction 0, whose provenance and columns become those of the pairs.
        total: number of fractions to expect; 0 until one has been seen.
        num_skipped, skipped: number of prompts that generation skipped, and the first of them with their reasons.
    """

    def __init__(self, folder: Path, name: str, num_fracs: int = 0, patient: bool = False) -> None:
        self.folder, self.name, self.num_fracs, self.patient = folder, name, num_fracs, patient
        self.reference: Fraction | None = None
        self.origin: Fraction | None = None
        self.total = 0
        self.num_skipped, self.skipped = 0, list[dict[str, str]]()
        self._next = 0  # number of the next fraction to take
        self._sum = 0  # of the id numbers read so far, modulo 2**64
        self._unproven = False  # whether a fraction without a recorded sum was read
        self._all_ids: int | None = None
        self._unreadable: dict[int, InputError] = {}

    def files(self) -> dict[int, Path]:
        """Return the existing fraction files by number."""
        return find_fractions(self.folder).get(self.name, {})

    def survey(self) -> None:
        """Check the headers of all existing fractions and, unless patient, that none is missing.

        Raises:
            InputError: naming the fraction and what is wrong.
        """
        for number in sorted(self.files()):
            self._open(number)
        self.check_surplus()
        if not self.patient and self.missing():
            raise missing_error([self], f"in {self.folder}")

    def _open(self, number: int) -> Fraction | None:
        """Open a fraction and compare it with the first one; None if it is missing or unreadable in a patient split."""
        path = fraction_path(self.folder, self.name, number)
        try:
            file = open_parquet(path)
        except InputError as error:
            if not self.patient:
                raise
            self._unreadable[number] = error
            return None
        self._unreadable.pop(number, None)
        fraction = Fraction(file, path, number)
        if self.reference is None:
            self.reference = fraction
            self.total = self._expected_total(fraction)
        self._check_agreement(self.reference, fraction)
        if number == 0:
            self.origin = fraction
        if number < self.total:
            self._check_size(fraction)
        return fraction

    def _expected_total(self, fraction: Fraction) -> int:
        num_prompts, frac_len = fraction.provenance.num_prompts, fraction.provenance.frac_len
        recorded = num_fractions(num_prompts, frac_len)
        # num_fracs limits training data; a test split is always gathered in full.
        expected = self.num_fracs if self.num_fracs and self.name == "train" else recorded
        if expected > recorded:
            raise InputError(
                f"num_fracs is {expected}, but {num_prompts} prompts with frac_len {frac_len} give {recorded} "
                "fractions: correct num_fracs"
            )
        return expected

    def _check_agreement(self, first: Fraction, other: Fraction) -> None:
        pair = f"{first.path.name} and {other.path.name} in {self.folder}"
        differences = first.provenance.differences(other.provenance)
        if None not in (first.all_ids, other.all_ids) and first.all_ids != other.all_ids:
            differences.append(f"extra.all_ids: {first.all_ids:016x} != {other.all_ids:016x}")
        if differences:
            raise InputError(f"{pair} come from different runs ({'; '.join(differences)}): generate one of them again")
        ours, theirs = (dict(zip(item.schema.names, item.schema.types, strict=True)) for item in (first, other))
        if ours != theirs:
            names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise InputError(f"{pair} differ in the columns {', '.join(names)}: generate one of them again")

    def _check_size(self, fraction: Fraction) -> None:
        recorded = fraction.provenance.data_frac
        if fraction.fraction_ids is not None and recorded != fraction.number:
            raise InputError(
                f"{fraction.path} records that it is fraction {recorded}: generate fraction {fraction.number} again"
            )
        if fraction.num_rows != (fraction.expected - len(fraction.skipped)) * fraction.num_samples:
            raise diagnose_fraction(fraction, self.files())

    def check_surplus(self) -> None:
        """Refuse fractions beyond the expected number."""
        surplus = [path.name for number, path in sorted(self.files().items()) if self.total and number >= self.total]
        if surplus:
            raise InputError(
                f"{self.folder} contains more than {self.total} {self.name} fractions ({', '.join(surplus)}): "
                "correct num_fracs or remove them"
            )

    def missing(self) -> list[int]:
        """Return the numbers of the fractions that are still missing; [0] until a fraction of the split has been seen."""
        present = self.files().keys() - self._unreadable.keys()
        return [number for number in range(self._next, max(1, self.total)) if number not in present]

    def awaited(self) -> str:
        """Return the missing fractions in words."""
        if not self.total:
            return f"the first {self.name} fraction"
        missing = self.missing()
        numbers = ", ".join(map(str, missing[:10])) + (" ..." if missing[10:] else "")
        return f"{self.name} fraction {numbers} of {self.total}"

    def reasons(self) -> list[str]:
        """Return why existing fractions could not be read."""
        return [str(error) for number, error in sorted(self._unreadable.items()) if number in self.files()]

    def is_done(self) -> bool:
        """Return whether the last fraction has been taken."""
        return self.total > 0 and self._next == self.total

    def take(self) -> Fraction | None:
        """Return the next fraction in order, or None if it does not exist yet.

        Whichever fraction arrives first determines how many there are.
        """
        if self.reference is None:
            any(self._open(number) for number in sorted(self.files()))
        # A fraction that was still being copied may be readable by now.
        for number in self._unreadable.keys() - {self._next}:
            self._open(number)
        if self.is_done() or not fraction_path(self.folder, self.name, self._next).exists():
            return None
        fraction = self._open(self._next)
        self._next += fraction is not None
        return fraction

    def read(self, fraction: Fraction) -> Iterator[pa.RecordBatch]:
        """Stream the rows of a fraction in batches of whole prompts, in the column order of fraction 0.

        Raises:
            InputError: a batch, or in the end the fraction, does not contain the expected rows; the error names the fault.
        """
        assert self.origin is not None
        names = self.origin.schema.names
        found, total = len(fraction.skipped), sum(id_number(item["prompt_id"]) for item in fraction.skipped)
        for batch in fraction.batches():
            ids = prompt_ids(batch, fraction.num_samples)
            if ids is None:
                raise diagnose_fraction(fraction, self.files())
            found += len(ids)
            total += sum(map(id_number, ids))
            yield batch.select(names) if fraction.schema.names != names else batch
        total %= 2**64
        # Equal sums of 64-bit id numbers: the fraction contains the recorded prompts, none missing and none repeated.
        if found != fraction.expected or fraction.fraction_ids not in (None, total):
            raise diagnose_fraction(fraction, self.files())
        self._note(fraction, total)

    def _note(self, fraction: Fraction, total: int) -> None:
        self._sum = (self._sum + total) % 2**64
        self._unproven |= fraction.fraction_ids is None
        self._all_ids = fraction.all_ids if self._all_ids is None else self._all_ids
        self.num_skipped += len(fraction.skipped)
        self.skipped += fraction.skipped[: _EXAMPLES - len(self.skipped)]

    def conclude(self) -> None:
        """Prove, once all fractions have been read, that no prompt is missing or appears twice.

        Raises:
            InputError: naming the repeated prompt and its two files, if there is one.
        """
        assert self.reference is not None
        self.check_surplus()
        made = self.reference.provenance
        is_complete = self.total == num_fractions(made.num_prompts, made.frac_len)
        if is_complete and self._all_ids is not None:
            if self._sum != self._all_ids:
                raise repeated_prompt(self._ours(), self.reference.num_samples) or InputError(
                    f"the {self.name} fractions in {self.folder} do not contain the prompts of their data set "
                    "(extra.all_ids): generate all of them again from one data set"
                )
        # Without recorded sums (files of an early version), search for repeated prompts, 8 bytes per prompt.
        elif self._unproven and (error := repeated_prompt(self._ours(), self.reference.num_samples)):
            raise error

    def _ours(self) -> dict[int, Path]:
        return {number: fraction_path(self.folder, self.name, number) for number in range(self.total)}


def find_fractions(folder: Path) -> dict[str, dict[int, Path]]:
    """Return the fraction files of each split in a folder, by number."""
    splits: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.parquet")):
        name = FRACTION_NAME.fullmatch(path.name)
        if name and not path.name.startswith("."):
            splits.setdefault(name["split"], {})[int(name["number"])] = path
    return splits


def missing_error(splits: Sequence[Split], where: str) -> InputError:
    """Return the error that names all missing fractions and the commands that generate them."""
    parts, commands = [], []
    for split in splits:
        missing = split.missing()
        parts.append(f"{split.awaited()} {'is' if len(missing) == 1 else 'are'} missing")
        flags = " and ".join(f"--data_frac {number}" for number in missing[:3]) + (" ..." if missing[3:] else "")
        commands.append(f"--split {split.name}" + (f" with {flags}" if split.total else ""))
    reasons = [reason for split in splits for reason in split.reasons()]
    return InputError(
        f"{'; '.join(parts)} {where}: run generate.py {'; '.join(commands)}"
        + "".join(f" ({reason})" for reason in reasons[:3])
    )


def arriving(splits: Sequence[Split], wait: float, say: Callable[[str], Any]) -> Iterator[tuple[Split, Fraction]]:
    """Yield all fractions as soon as they exist, those of each split in the order of their numbers.

    ``say`` is called with what is awaited, whenever that changes and once a minute.

    Raises:
        InputError: no fraction arrived for ``wait`` seconds; the error names the missing ones.
    """
    seen, since, said, reported_at = _stamps(splits), time.monotonic(), "", 0.0
    while waiting := [split for split in splits if not split.is_done()]:
        taken = False
        for split in waiting:
            while (fraction := split.take()) is not None:
                taken = True
                yield split, fraction
        if taken:
            since = time.monotonic()
            continue
        now, stamps = time.monotonic(), _stamps(splits)
        if stamps != seen:  # a file is growing, so the wait starts again
            seen, since = stamps, now
        late = [split for split in waiting if split.missing()]
        if late and now - since >= wait:
            ending = f" after {wait:g} s without a new one" if wait else ""
            raise missing_error(late, f"in {splits[0].folder}{ending}")
        awaited = "waiting for " + "; ".join(split.awaited() for split in late)
        if late and (awaited != said or now - reported_at >= _REPORT_SECONDS):
            say(awaited)
            said, reported_at = awaited, now
        time.sleep(min(_POLL_SECONDS, wait / 20))


def _stamps(splits: Sequence[Split]) -> set[tuple[str, int, int]]:
    """Return a value that changes when a fraction appears or grows."""
    stamps = set()
    for path in (path for split in splits for path in split.files().values()):
        try:
            stat = path.stat()
        except FileNotFoundError:  # replaced between listing and stat
            continue
        stamps.add((path.name, stat.st_size, stat.st_mtime_ns))
    return stamps
