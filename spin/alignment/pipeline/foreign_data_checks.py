"""Problems in data files of other tools: what the programs that read them would refuse, row by row where rows are independent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.pipeline.row_checks import row_problems

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder

Rows = Iterator[tuple[str, Mapping[str, Any]]]


def foreign_files(path: Path, besides: Sequence[Path]) -> list[Path]:
    """Return the data files of a folder, of all of its splits, or the file itself; next to the project's own files, which are the
    splits of the folder then, all others.

    Raises:
        InputError: a file is of an unknown type, or one that is numbered is missing.
    """
    from spin.alignment.data.dataset_folders import find_splits, is_data_file
    from spin.alignment.data.source_files import split_files

    if path.is_file():
        return [] if path in besides else split_files(path, None)
    if besides:
        return [file for file in sorted(path.iterdir()) if is_data_file(file)]
    return [file for split in find_splits(path, None) for file in split_files(path, split)]


def foreign_problems(file: Path, encoder: ChatEncoder | None) -> tuple[int, list[str]]:
    """Return the number of rows read from a data file of another tool, and the problems.

    Prompts are read as ``generate.py`` reads them: each row with a problem is named. Pairs are read as ``run_spin.py`` does,
    which needs all of them together: the first problem is named. An ``encoder`` also renders their prompts.
    """
    from spin.alignment.data.file_readers import read_file
    from spin.alignment.data.foreign_forms import pair_form

    records = read_file(file)
    try:
        first = next(records, None)
        if first is None:
            return 0, [f"{file} contains no rows: give a file with data in it"]
        is_pairs = "rejected" in pair_form(first[1], first[0])
    except InputError as error:
        return 0, [str(error)]
    rows = chain([first], records)
    return _pair_problems(rows, file, encoder) if is_pairs else _prompt_problems(rows, file, encoder)


def _pair_problems(rows: Rows, file: Path, encoder: ChatEncoder | None) -> tuple[int, list[str]]:
    from spin.alignment.data.preference_forms import converted_table

    read = _Counted(rows)
    try:
        table = converted_table(iter(read), str(file))
    except InputError as error:
        return read.count, [str(error)]
    problems = []
    for number, row in enumerate(table.to_pylist()):
        problems += row_problems(row, f"{file} pair {number}", True, encoder)
    return read.count, problems


def _prompt_problems(rows: Rows, file: Path, encoder: ChatEncoder | None) -> tuple[int, list[str]]:
    from spin.alignment.data.columns import RowNotes
    from spin.alignment.data.formats import to_conversations

    notes, problems, places, read = RowNotes(), [], dict[str, str](), _Counted(rows)
    try:
        for where, record in read:
            try:
                conversations = to_conversations(record, where, ground_truth_required=False, notes=notes)
            except InputError as error:
                problems.append(str(error))
                continue
            for conversation in conversations:
                earlier = places.setdefault(conversation.prompt_id, where)
                if earlier != where:
                    problems.append(
                        f"{where} and {earlier} have the same prompt id {conversation.prompt_id}: run spin/reformat.py, which "
                        "removes repeated prompts"
                    )
                problems += row_problems(conversation.row(), where, False, encoder)
    except InputError as error:  # the rest of the file cannot be read
        problems.append(str(error))
    notes.tell(str(file))
    return read.count, problems


class _Counted:
    """Rows, counted as they are read."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.count = rows, 0

    def __iter__(self) -> Rows:
        for row in self.rows:
            self.count += 1
            yield row
