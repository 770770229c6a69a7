"""The models that a running server lists, and which of them is the one that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.server_link import RetryPolicy, ServerLink

Card = dict[str, Any]


def read_cards(link: ServerLink, policy: RetryPolicy, right_server: str, path: str = "/models") -> list[Card]:
    """Return what a server says about each model that it serves.

    Raises:
        InputError: it cannot be reached, or lists no models; ``right_server`` says what kind of server is needed.
    """
    answer = link.start(link.send(path, "the request for its models", policy)).result()
    cards = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) and card.get("id") for card in cards):
        raise InputError(f"{link.url}{path} lists no models: {right_server}")
    return cards


def matching_card(cards: Sequence[Card], model: str) -> Card | None:
    """Return the first card with the best kind of match: the same id or path, else (for a folder) the same folder name."""
    cards = [card for card in cards if not is_another(card, model)]
    words = {model, str(Path(model).resolve())} if Path(model).is_dir() else {model}
    folder_names = {Path(word).name for word in words} if Path(model).is_dir() else set()
    kinds: tuple[Callable[[Card], bool], ...] = (
        lambda card: card["id"] in words,
        lambda card: card.get("root") in words,
        lambda card: Path(card["id"]).name in folder_names,
        lambda card: Path(card.get("root") or "").name in folder_names,
    )
    return next((card for known in kinds for card in cards if known(card)), None)


def is_another(card: Card, model: str) -> bool:
    """Return whether the server loaded a folder that exists here too and is not the requested one."""
    root = Path(card.get("root") or "")
    return root.is_absolute() and root.is_dir() and Path(model).is_dir() and not root.samefile(model)


def listed(cards: Sequence[Card]) -> str:
    """Return the names of the models, and where they were loaded from if that differs."""
    shown = [
        card["id"] + (f" (from {card['root']})" if card.get("root") not in (None, card["id"]) else "") for card in cards
    ]
    return ", ".join(shown) or "nothing"
