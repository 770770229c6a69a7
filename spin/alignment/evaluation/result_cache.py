"""Results of evaluations by content: the same model, data and settings are not evaluated twice."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import atomic_file, read_json, write_json_atomic
from spin.alignment.core.provenance import Provenance, hash_file, hash_json, hash_text
from spin.alignment.core.settings import declaration_of, settings_of
from spin.alignment.evaluation.config import EvaluateConfig
from spin.alignment.evaluation.responses import responses_path

if TYPE_CHECKING:
    from spin.alignment.evaluation.held_out import HeldOut


def result_key(config: EvaluateConfig, made: Provenance, held_out: Sequence[HeldOut]) -> str:
    """Return a hash of everything that results depend on.

    That is the weights, tokenizer and template; the encoded prompts, ground truths and columns; every setting that is not
    declared to have no effect; the scorers with their weights and modules; the responses compared with; local tasks; and the
    versions of the packages.
    """
    from spin.alignment.pairs.annotate import scorer_record

    fields = settings_of(type(config))
    settings = {
        name: getattr(config, name) for name, field in fields.items() if declaration_of(field).recorded is not False
    }
    rows = [
        [item.request.prompt_id, item.request.token_ids, item.ground_truth_ids, item.messages, dict(item.columns)]
        for item in held_out
    ]
    files = [responses_path(path) for path in config.against]
    files += sorted(Path(config.task_dir).rglob("*")) if config.task_dir else []
    return hash_json(
        {
            "model": [made.weights_hash, made.tokenizer_hash],
            "template": made.chat_template_hash,
            "data": hash_text(*(hash_json(row) for row in rows)),
            "settings": settings,
            "scorers": [scorer_record(item) for item in config.scorers.values()],
            "files": [[path.name, hash_file(path)] for path in files if path.is_file()],
            "versions": made.versions,
            "computed_in": made.extra.get("computed_in"),
        }
    )


def stored_result(config: EvaluateConfig, key: str) -> dict[str, Any] | None:
    """Return the result with this key in ``output_file``, or copied there from ``cache_dir``; None if there is none whole."""
    output = Path(config.output_file)
    found = _whole(output, key)
    if found is not None or config.cache_dir is None:
        return found
    cached = Path(config.cache_dir) / f"{key}.json"
    found = _whole(cached, key)
    if found is None:
        return None
    with responses_path(cached).open("rb") as source, atomic_file(responses_path(output)) as file:
        shutil.copyfileobj(source, file)
    found = {**found, "model": config.model, "input_dir": config.input_dir, "split": config.split}
    write_json_atomic(output, found)
    return found


def keep_result(config: EvaluateConfig, key: str, result: Mapping[str, Any]) -> None:
    """Copy a written result to ``cache_dir``, if there is one and the weights are known; its JSON file comes last."""
    if config.cache_dir is None or not result["weights_hash"]:
        return
    folder = Path(config.cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        responses_path(config.output_file).open("rb") as source,
        atomic_file(folder / f"{key}.parquet") as file,
    ):
        shutil.copyfileobj(source, file)
    write_json_atomic(folder / f"{key}.json", result)


def _whole(path: Path, key: str) -> dict[str, Any] | None:
    """Return the content of a result file if it has this key, and its responses are those that were written with it."""
    responses = responses_path(path)
    if not path.is_file() or not responses.is_file():
        return None
    try:
        found = read_json(path)
    except InputError:
        return None
    same = isinstance(found, dict) and found.get("key") == key and found.get("responses_hash") == hash_file(responses)
    return found if same else None
