"""Reading data sets of the Hugging Face Hub: their configurations and splits, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from spin.alignment.core.errors import InputError, suggestion
from spin.alignment.data.split_names import same_splits

T = TypeVar("T")


def read_hub(name: str, config: str | None, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream the rows of a Hub data set as ``("name row N", record)``.

    ``train`` stands for ``train_prefs`` too, and the other way round, unless the data set has both.

    Raises:
        InputError: the data set cannot be reached, or has no such configuration or split.
    """
    import datasets

    configs = _asked(name, lambda: datasets.get_dataset_config_names(name))
    config = _chosen_config(name, config, configs)
    splits = _asked(name, lambda: datasets.get_dataset_split_names(name, config))
    chosen = _chosen_split(name, split or "train", splits)
    rows = iter(_asked(name, lambda: datasets.load_dataset(name, config, split=chosen, streaming=True)))
    row = 0
    while (record := _asked(name, lambda: next(rows, None))) is not None:
        yield f"{name} row {row}", dict(record)
        row += 1


def _asked(name: str, request: Callable[[], T]) -> T:
    try:
        return request()
    except Exception as error:  # whatever the library, the network or a file of the data set raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"'{name}' is neither a local file or folder nor a reachable Hub data set ({reason}): check the name"
        ) from error


def _chosen_config(name: str, config: str | None, configs: list[str]) -> str:
    if config is None and len(configs) > 1 and "default" not in configs:
        raise InputError(
            f"'{name}' has several configurations ({', '.join(configs)}): name one as config, or as {name}:{configs[0]}"
        )
    config = config or ("default" if "default" in configs else configs[0] if configs else "default")
    if config not in configs:
        raise InputError(
            f"'{name}' has no configuration '{config}' (it has {', '.join(configs)}): name one of these"
            f"{suggestion(config, configs)}"
        )
    return config


def _chosen_split(name: str, split: str, splits: list[str]) -> str:
    for candidate in same_splits(split):
        if candidate in splits:
            return candidate
    raise InputError(
        f"'{name}' has no split '{split}' (it has {', '.join(splits)}): name one of these{suggestion(split, splits)}"
    )
