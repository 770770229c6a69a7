"""The card of a model folder: what the model it starts from says of itself, and results that are added later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.cards import called, front_matter, is_own, read_card, with_section, write_card
from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

LIBRARY = "transformers"
RESULTS = "results"
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Start:
    """The model that a training starts from.

    Attributes:
        name: its Hub name, or the name of its folder.
        bases: Hub names of the models that it is, or derives from; empty if they are unknown.
        licence: ``license``, and where it has them ``license_name`` and ``license_link``; empty if it names none.
    """

    name: str
    bases: tuple[str, ...] = ()
    licence: dict[str, str] = field(default_factory=dict)


def describe_start(name: str, folder: Path) -> Start:
    """Return what the card of a model (or the record of ``spin import-gguf``) says of its origin and licence.

    Args:
        name: the model as a setting names it: a folder, or a Hub name.
        folder: its local folder.
    """
    data = front_matter(read_card(folder))
    licence = {key: str(data[key]) for key in _LICENCE_KEYS if isinstance(data.get(key), str)}
    if not licence and (imported := _imported_licence(folder)):
        licence = {"license": imported}
    if not Path(name).is_dir():
        return Start(name, (name,), licence)
    found = data.get("base_model")
    bases = found if isinstance(found, list) else [found]
    return Start(called(name), tuple(item for item in bases if isinstance(item, str)), licence)


def _imported_licence(folder: Path) -> str:
    path = folder / "import.json"
    if not path.is_file():
        return ""
    try:
        return str(read_json(path)["gguf"].get("license", ""))
    except (InputError, KeyError, TypeError, AttributeError):  # a card does without it
        return ""


def model_card_data(
    title: str, start: Start, licence: str | None, tags: Sequence[str], datasets: Sequence[str]
) -> ModelCardData:
    """Return the front matter of a trained model's card.

    Args:
        licence: the licence that the user gives the model; None: that of the start, else ``unknown``.
        datasets: Hub names of the data sets it was trained on.
    """
    from huggingface_hub import ModelCardData

    terms: dict[str, Any] = {"license": licence} if licence else start.licence or {"license": "unknown"}
    bases = list(start.bases)
    return ModelCardData(
        base_model=(bases[0] if len(bases) == 1 else bases) or None,
        datasets=list(datasets) or None,
        library_name=LIBRARY,
        model_name=title,
        pipeline_tag="text-generation",
        tags=list(tags),
        **terms,
    )


def complete_card(folder: Path, results: Sequence[EvalResult], text: str) -> None:
    """Add results to the card of a model folder: to its front matter (``model-index``) and as ``text`` to its section.

    Nothing else of the card is changed, and nothing at all if it has them already, or if this project has not written it.
    """
    from huggingface_hub import ModelCard

    old = read_card(folder)
    if old is None or not is_own(old):
        return
    new = with_section(old, RESULTS, text)
    if new is None or not front_matter(old):
        say_error(
            f"the card of {folder} is left without results: its front matter or its section '{RESULTS}' is damaged"
        )
        return
    card = ModelCard(new, ignore_metadata_errors=True)
    data: Any = card.data
    data.model_name = data.get("model_name") or folder.name
    data.eval_results = list(results)
    write_card(folder, str(card))
