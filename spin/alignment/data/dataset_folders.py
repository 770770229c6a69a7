"""What a folder of a data set contains, split by split: plain files, ``save_to_disk`` folders, and cloned repositories.

A repository may have several configurations (subsets): named in the ``configs`` of its README, or one subfolder each.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from spin.alignment.core.cards import CARD_FILE, is_own
from spin.alignment.core.errors import InputError, suggestion
from spin.alignment.data.file_readers import data_suffix

# The files of each split, by the name of the split. The name is empty if the folder does not give one.
Splits = dict[str, list[Path]]
# Files that describe data, models or runs. They are never read as rows.
_DESCRIPTIONS = frozenset(
    {
        *("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "croissant.json"),
        *("metadata.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("special_tokens_map.json", "package.json", "manifest.json", "summary.json", "metrics.json"),
    }
)
_RECORDS = (".counts.json", ".weights.json")  # statistics that this project writes next to data files
_NUMBERED = re.compile(r"(?P<name>.+?)-(?P<number>\d+)(?:-of-(?P<total>\d+))?(?:-[0-9a-f]{16})?")
# Other spellings of a number with its total: ``train_00000_of_00002``, ``train.0-of-2``, and ``00000-of-00002`` alone.
_WITH_TOTAL = re.compile(r"(?:(?P<name>.+?)[-_.])?(?P<number>\d+)[-_.]of[-_.](?P<total>\d+)", re.IGNORECASE)
_SPARK = re.compile(r"part-\d+(-.*)?")
_CARD = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_SPLIT_FOLDERS = ("train", "test", "validation", "valid", "val", "dev", "eval")


def numbered_name(stem: str) -> re.Match[str] | None:
    """Return the groups ``name``, ``number`` and ``total`` of the name of a file in a numbered set; None for other names."""
    return _WITH_TOTAL.fullmatch(stem) or _NUMBERED.fullmatch(stem)


def table_name(file: Path) -> str:
    """Return the name of a data file without suffixes and number: that of its split, or empty if it is only a number."""
    stem = file.name.removesuffix(data_suffix(file))
    if match := numbered_name(stem):
        return match["name"] or ""
    return "" if stem.isdigit() or _SPARK.fullmatch(stem) else stem


def find_splits(folder: Path, config: str | None) -> Splits:
    """Return the files of a folder by split.

    Args:
        config: the configuration to read, for a folder with several.

    Raises:
        InputError: an unknown or missing configuration, or a damaged description of the data set.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        if config:
            raise InputError(f"{folder} was written by save_to_disk and has no configurations: remove '{config}'")
        return _saved_splits(folder)
    if described := _described_configs(folder):
        return _described_splits(folder, _chosen(described, config, folder))
    # A file beside the folder data/ may be anything; the split is looked for in both.
    inner, outer = ({}, {}) if config else (_plain_splits(folder / "data"), _plain_splits(folder))
    if both := inner.keys() & outer.keys():
        name = min(both)
        raise InputError(
            f"{folder} contains the split '{name}' twice, as {outer[name][0].name} and as data/{inner[name][0].name}: "
            "remove one, or name a file"
        )
    if found := {**inner, **outer}:
        return found
    configs = _config_folders(folder)
    return configs[_chosen(configs, config, folder)] if configs or config else {}


def _chosen(configs: dict[str, Any], config: str | None, folder: Path) -> str:
    names = ", ".join(configs) or "none"
    if config is None and len(configs) == 1:
        return next(iter(configs))
    if config is None:
        marked = [name for name, item in configs.items() if name == "default" or (item or {}).get("default") is True]
        if not marked:
            raise InputError(f"{folder} has several configurations ({names}): name one as config, or as {folder}:NAME")
        return marked[0]
    if config not in configs:
        raise InputError(
            f"{folder} has no configuration '{config}' (it has {names}): name one of these{suggestion(config, configs)}"
        )
    return config


def _plain_splits(folder: Path) -> Splits:
    """Return the data files of a folder by name, and those of its subfolders that are named like splits."""
    splits: Splits = {}
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path)) if folder.is_dir() else ():
        if is_data_file(path):
            splits.setdefault(table_name(path), []).append(path)
        elif path.is_dir():
            name = path.name.removesuffix(data_suffix(path))  # Spark writes a table as a folder train.parquet
            if name.split("_")[0] not in _SPLIT_FOLDERS or name.partition("_")[2] not in ("", "prefs", "sft", "gen"):
                continue
            files = [file for file in sorted(path.iterdir()) if is_data_file(file)]
            if files and name in splits:
                raise InputError(
                    f"{folder} contains the split '{name}' twice, as {splits[name][0].relative_to(folder)} and as "
                    f"{files[0].relative_to(folder)}: remove one, or name a file"
                )
            if files:
                splits[name] = files
    return splits


def is_data_file(path: Path) -> bool:
    """Return whether a file can be rows of a data set: by its name, and not one that describes data."""
    hidden = path.name.startswith((".", "_"))
    described = path.name in _DESCRIPTIONS or path.name.endswith(_RECORDS)
    return bool(data_suffix(path)) and not hidden and not described and path.is_file()


def _config_folders(folder: Path) -> dict[str, Splits]:
    configs: dict[str, Splits] = {}
    for parent in (folder, folder / "data"):
        for path in sorted(parent.iterdir()) if parent.is_dir() else ():
            if path.is_dir() and not path.name.startswith(".") and (splits := _plain_splits(path)):
                configs.setdefault(path.name, splits)
    return configs


def _saved_splits(folder: Path) -> Splits:
    """Return the Arrow files of a ``Dataset`` or ``DatasetDict`` that ``save_to_disk`` wrote."""
    if not (folder / "dataset_dict.json").is_file():
        state = _read_object(folder / "state.json")
        return {str(state.get("_split") or ""): _saved_files(folder, state)}
    names = _read_object(folder / "dataset_dict.json").get("splits")
    if not isinstance(names, list) or not names:
        raise InputError(f"{folder / 'dataset_dict.json'} names no splits: save the data set again")
    splits = {}
    for name in map(str, names):
        if not (folder / name / "state.json").is_file():
            raise InputError(
                f"{folder} lacks the split '{name}' that its dataset_dict.json names: save the data set again"
            )
        splits[name] = _saved_files(folder / name, _read_object(folder / name / "state.json"))
    return splits


def _saved_files(folder: Path, state: dict[str, Any]) -> list[Path]:
    if state.get("_indices_data_files"):
        raise InputError(
            f"{folder} is a selection of rows stored by indices: save it with a current version of datasets"
        )
    entries = state.get("_data_files")
    names = (
        [str(item.get("filename")) for item in entries if isinstance(item, dict)] if isinstance(entries, list) else []
    )
    if not names:
        raise InputError(f"{folder / 'state.json'} names no data files: save the data set again")
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise InputError(f"{folder} lacks {file.name}, which its state.json names: save or copy the data set again")
    return files


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): save the data set again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not an object: save the data set again")
    return value


def _described_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the configurations with data files in the metadata of the README (`configs` of a dataset card).

    A card that this project wrote is for other readers: the names of the files say all that it says, and are always current.
    """
    card = folder / CARD_FILE
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff")
    if is_own(text):
        return {}
    match = _CARD.match(text)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"the metadata of {card} is not YAML ({' '.join(str(error).split())}): correct it") from error
    entries = metadata.get("configs") if isinstance(metadata, dict) else None
    entries = [item for item in entries if isinstance(item, dict)] if isinstance(entries, list) else []
    return {
        str(item.get("config_name", "default")): item for item in entries if "data_files" in item or "data_dir" in item
    }


def _described_splits(folder: Path, name: str) -> Splits:
    entry = _described_configs(folder)[name]
    root = folder / str(entry.get("data_dir") or "")
    if "data_files" not in entry:
        return _plain_splits(root)
    splits: Splits = {}
    for split, patterns in _patterns(entry["data_files"]):
        for pattern in patterns:
            files = _matching(root, pattern)
            if not files:
                raise InputError(
                    f"{folder} lacks {pattern}, which its README names for the split '{split}' of the configuration "
                    f"'{name}': copy the whole repository"
                )
            splits.setdefault(split, []).extend(file for file in files if file not in splits.get(split, ()))
    return splits


def _patterns(data_files: Any) -> list[tuple[str, list[str]]]:
    """Return (split, patterns) for each way to write ``data_files``; patterns without a split are those of ``train``."""
    if isinstance(data_files, dict):
        return [(str(split), _texts(paths)) for split, paths in data_files.items()]
    items = data_files if isinstance(data_files, list) else [data_files]
    entries = [item for item in items if isinstance(item, dict)]
    bare = [item for item in items if isinstance(item, str)]
    found = [(str(item.get("split", "train")), _texts(item.get("path"))) for item in entries]
    return found + ([("train", bare)] if bare else [])


def _texts(value: Any) -> list[str]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def _matching(root: Path, pattern: str) -> list[Path]:
    if "://" in pattern or pattern.startswith("/") or ".." in Path(pattern).parts:
        return []
    return sorted(path for path in root.glob(pattern) if data_suffix(path) and path.is_file())
