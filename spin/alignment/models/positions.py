"""Rotary positions that depend on the longest sequence of a batch, and therefore on the neighbours of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# transformers picks the frequencies of these types by the longest sequence of a batch. "su" is an older name of longrope.
_LONGROPE = {"longrope", "su"}


def fixed_positions(config: Mapping[str, Any]) -> int | None:
    """Return the number of tokens up to which a model's positions do not depend on other rows; None if they never do.

    ``config`` is the content of ``config.json``, or of ``to_dict()`` of a model's text configuration.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    settings = [
        found,
        *(value for value in found.values() if isinstance(value, Mapping)),
    ]  # one for all layers, or by type
    kinds = {setting.get("rope_type") or setting.get("type"): setting for setting in settings}
    context = config.get("max_position_embeddings")
    for kind in _LONGROPE & kinds.keys():
        own = kinds[kind].get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        return int(own or context or 0) or None
    return int(context) if "dynamic" in kinds and context else None
