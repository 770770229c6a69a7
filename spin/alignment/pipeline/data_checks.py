"""Problems in the rows of data files and in a model folder, one sentence for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spin.alignment.core.errors import InputError
from spin.alignment.pipeline.foreign_data_checks import foreign_files, foreign_problems
from spin.alignment.pipeline.row_checks import row_problems

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder

_SHOWN_PER_FILE = 20


def data_problems(path: Path, encoder: ChatEncoder | None) -> tuple[int, list[str]]:
    """Return the number of rows in a data file, or in the files of a folder, and their problems.

    With an ``encoder`` token ids are checked too: they must decode to the text and end as the finish reason says.

    Raises:
        InputError: there is no data file at ``path``.
    """
    own = [file for file in ([path] if path.is_file() else sorted(path.glob("*.parquet"))) if is_own_file(file)]
    foreign = [file for file in foreign_files(path, besides=own) if file not in own]
    if not own and not foreign:
        raise InputError(f"{path} contains no data file, model or run: check the path")
    checked, problems = 0, file_set_problems(own)
    for file in (*own, *foreign):
        rows, found = file_problems(file, encoder) if file in own else foreign_problems(file, encoder)
        checked += rows
        # A systematic error would otherwise print one line per row.
        problems += found[:_SHOWN_PER_FILE]
        if len(found) > _SHOWN_PER_FILE:
            problems.append(f"{file}: {len(found) - _SHOWN_PER_FILE} more problems")
    return checked, problems


def is_own_file(file: Path) -> bool:
    """Return whether a file is a parquet file of this project, or damaged, and not one of another tool."""
    from spin.alignment.core.parquet import open_parquet

    if file.suffix != ".parquet":
        return False
    try:
        names = set(open_parquet(file).schema_arrow.names)
    except InputError:
        return True  # file_problems() says what is wrong
    return {"prompt_id", "chosen"} <= names


def file_set_problems(files: Sequence[Path]) -> list[str]:
    """Problems between files: provenance that does not match, and gaps in numbered sets."""
    import re

    from spin.alignment.core.parquet import open_parquet
    from spin.alignment.core.provenance import Provenance, read_provenance

    problems: list[str] = []
    first: dict[str, tuple[Path, Provenance]] = {}
    totals: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if numbered := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.parquet", file.name):
            totals.setdefault((numbered[1], int(numbered[3])), set()).add(int(numbered[2]))
        try:
            found = read_provenance(open_parquet(file).schema_arrow, file)
        except InputError:
            continue  # reported by file_problems
        split = f"{found.kind} {found.split}"
        other, provenance = first.setdefault(split, (file, found))
        if differing := provenance.differences(found):
            problems.append(f"{other.name} and {file.name} come from different runs: {'; '.join(differing)}")
    for (name, total), numbers in totals.items():
        missing = [str(number) for number in range(total) if number not in numbers]
        if missing and len(files) > 1:
            problems.append(f"{name}: the files {', '.join(missing)} of {total} are missing")
    return problems


def file_problems(file: Path, encoder: ChatEncoder | None) -> tuple[int, list[str]]:
    """Return the number of rows of a parquet file and its problems, each naming the row."""
    from spin.alignment.core.parquet import open_parquet
    from spin.alignment.core.provenance import read_provenance

    problems: list[str] = []
    try:
        parquet = open_parquet(file)
    except InputError as error:
        return 0, [str(error)]
    try:
        read_provenance(parquet.schema_arrow, file)
    except InputError as error:
        problems.append(str(error))
    columns = set(parquet.schema_arrow.names)
    is_pair_file = "rejected" in columns
    needed = {"prompt_id", "chosen"} | ({"sample_index", "rejected"} if is_pair_file else set())
    if needed - columns:
        problems.append(f"{file} lacks the columns {', '.join(sorted(needed - columns))}: convert it again")
        return parquet.metadata.num_rows, problems
    seen: set[tuple[str, int]] = set()
    try:
        for number, row in enumerate(_rows(file)):
            where = f"{file} row {number}"
            key = (row["prompt_id"], row.get("sample_index") or 0)
            if not row["prompt_id"]:
                problems.append(f"{where}: the prompt_id is empty")
            elif key in seen:
                problems.append(f"{where}: prompt {key[0]} with sample {key[1]} appears more than once")
            seen.add(key)
            problems += row_problems(row, where, is_pair_file, encoder)
    except InputError as error:
        problems.append(str(error))
    return parquet.metadata.num_rows, problems


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    from spin.alignment.core.parquet import read_rows

    return read_rows(file)


def model_problems(folder: Path) -> list[str]:
    """Return what prevents a model folder from being used: configuration, weights, tokenizer, template, end token.

    The folder of a sequence classifier is checked as a scorer, which needs no chat template.
    """
    from spin.alignment.core.provenance import hash_weights
    from spin.alignment.data.chat_encoder import load_encoder, load_tokenizer
    from spin.alignment.models.folder import check_model_path, read_config_file
    from spin.alignment.models.vocabulary import check_control_tokens
    from spin.alignment.models.weights_check import Task, check_model

    problems, model_config, task = [], None, "causal"
    try:
        check_model_path(str(folder))
        architectures = read_config_file(folder).get("architectures") or []
        if isinstance(architectures, list) and any("SequenceClassification" in str(name) for name in architectures):
            task = "classifier"
        model_config = check_model(folder, cast("Task", task))
        hash_weights(folder)  # refuses weights that are not those that were saved
    except InputError as error:
        problems.append(str(error))
    for weights in sorted(folder.glob("*.safetensors")):
        problems += [
            problem for problem in weight_problems(weights) if not any(str(weights) in one for one in problems)
        ]
    try:
        if task == "causal":
            encoder = load_encoder(folder)
            if model_config is not None:
                check_control_tokens(encoder, model_config, str(folder))
        else:
            load_tokenizer(str(folder))
    except InputError as error:
        problems.append(str(error))
    return problems


def weight_problems(path: Path) -> list[str]:
    """Return whether a weight file is damaged or contains numbers that are not finite."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            broken = []
            for name in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    broken.append(name)
    except (SafetensorError, OSError) as error:
        return [f"{path} is damaged ({error}): save the model again"]
    return [f"{path}: the weight {name} contains numbers that are not finite" for name in broken]
