"""The date that chat templates write into the system prompt: pinned, so that a rerun on another day gives the same ids."""

from __future__ import annotations

import datetime
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import write_text_atomic

DATE_FILE = "template-date"
_TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.json", "*.jinja", "additional_chat_templates/*.jinja")


def today() -> datetime.date:
    """Return the current day, in local time as chat templates read it."""
    return datetime.date.today()


def parse_date(text: str, where: str = "template_date") -> datetime.date:
    """Return the day of a text such as ``2026-11-28``.

    Raises:
        InputError: it is no day; ``where`` names the setting.
    """
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise InputError(f"{where} is '{text}': write a day as YYYY-MM-DD") from None


def template_has_date(folder: Path) -> bool:
    """Return whether a chat template in a model folder writes the date, without loading the tokenizer."""
    files = (path for pattern in _TEMPLATE_FILES for path in folder.glob(pattern))
    return any("strftime_now" in path.read_text(encoding="utf-8", errors="replace") for path in files)


def pinned_date(setting: str | None, recorded: Iterable[str | None]) -> datetime.date | None:
    """Return the date that a program uses: its setting, else the first that an earlier step recorded, else None (today)."""
    for text in (setting, *recorded):
        if text:
            return parse_date(str(text))
    return None


def shared_date(folder: Path) -> datetime.date:
    """Return today's date as the first process recorded it in ``folder``, so that all that work there agree across midnight."""
    path = folder / DATE_FILE
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f".{DATE_FILE}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    own.write_text(today().isoformat(), encoding="utf-8")
    try:
        os.link(own, path)  # unlike a rename, it fails if another process was first
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            write_text_atomic(path, today().isoformat())
    finally:
        own.unlink(missing_ok=True)
    return parse_date(path.read_text(encoding="utf-8").strip(), str(path))


def recorded_in_json(path: Path) -> str | None:
    """Return the ``template_date`` of a record in JSON, such as ``inputs.json``; None without the file or the key."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    date = content.get("template_date") if isinstance(content, dict) else None
    return date if isinstance(date, str) else None


def recorded_in_rows(files: Iterable[Path]) -> str | None:
    """Return the date in the provenance of generated or preference rows, None if no file has one.

    Raises:
        InputError: the files were generated with different dates.
    """
    from spin.alignment.core.parquet import open_parquet
    from spin.alignment.core.provenance import read_provenance

    found: dict[str, Path] = {}
    for file in files:
        try:
            date = read_provenance(open_parquet(file).schema_arrow, file).sampling.get("template_date")
        except InputError:  # rows from elsewhere, or damaged: their reader says so
            continue
        if date:
            found.setdefault(str(date), file)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise InputError(
            f"{first} was generated with the date {one} and {second} with {other}: generate them again with one template_date"
        )
    return next(iter(found), None)
