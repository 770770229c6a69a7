"""The model card of a training: method, lineage, data, training metrics, how to reproduce it, and limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

import yaml

from spin.alignment.core.cards import markdown_table, portable, render_card, section, short_names, write_card
from spin.alignment.core.machine import describe_machine
from spin.alignment.core.parquet import open_parquet
from spin.alignment.core.provenance import (
    METADATA_KEY,
    Provenance,
    content_hashes,
    hash_text,
    package_versions,
    read_provenance,
)
from spin.alignment.data.mixture import Piece, pieces_of
from spin.alignment.data.source_files import split_files
from spin.alignment.data.source_names import is_local, name_and_config
from spin.alignment.methods.pairings import PAIRINGS
from spin.alignment.methods.weightings import WEIGHTINGS
from spin.alignment.models.card import RESULTS, describe_start, model_card_data
from spin.alignment.models.folder import model_folder
from spin.alignment.training.described import describe_function

if TYPE_CHECKING:
    from spin.alignment.training.program import TrainingJob, TrainingProgram

_UNSCORED = (
    "Not scored on held-out prompts yet: `spin run` completes this card after its evaluation, and `spin/evaluate_model.py` "
    "scores any model."
)
# Settings that name paths, which the record of inputs leaves out.
_PATHS = ("model_name_or_path", "eval_prompts")


def write_model_card(program: TrainingProgram, job: TrainingJob, metrics: Mapping[str, Any]) -> None:
    """Write the card of a trained model into its folder.

    Args:
        metrics: the content of ``metrics.json``.
    """
    settings = job.settings
    model, inputs = settings.model, program.inputs(job)
    described = program.describe(settings)
    start = describe_start(model.model_name_or_path, model_folder(model.model_name_or_path, model.model_revision))
    sources = list(settings.data.dataset_mixer)
    names = {**short_names(sources), model.model_name_or_path: start.name}
    records = {source: record for source in sources if (record := _provenance(source, settings.data.dataset_splits))}
    hub_names = sorted({name_and_config(source)[0] for source in sources if not is_local(source)})
    write_card(
        settings.output_dir,
        render_card(
            "spin.alignment.training",
            "model_card.md.jinja",
            model_card_data(described.title, start, settings.output.license, described.tags, hub_names),
            described=described,
            method=[*described.method, *_parts_of_method(records.values())],
            licence=settings.output.license or start.licence.get("license", "unknown"),
            start=start,
            start_weights=inputs["model"],
            start_is_random=model.init_from_config,
            revision=model.model_revision,
            opponents=[_opponent(names[source], record, inputs["model"]) for source, record in records.items()],
            data_table=_data_table(pieces_of(settings.data.dataset_mixer, settings.data.dataset_splits), names),
            data_hash=inputs["data"],
            data_lines=program.describe_data(job.data),
            training_table=_training_table(program, job, metrics),
            steps=metrics["steps"],
            results=section(RESULTS, _UNSCORED),
            command=_command(program.script, settings.arguments.world_size),
            config=_config(settings.values, inputs, names),
            seed=settings.arguments.seed,
            versions={**_own_version(), **package_versions()},
            machine=describe_machine(),
        ),
    )


def _provenance(source: str, splits: list[str]) -> Provenance | None:
    """Return the record of the pairs in a source; None for data from elsewhere, such as prompts."""
    if not is_local(source):
        return None
    for file in split_files(source, splits[0]):
        schema = open_parquet(file).schema_arrow if file.suffix == ".parquet" else None
        if schema is not None and METADATA_KEY in (schema.metadata or {}):
            found = read_provenance(schema, file)
            return found if found.kind == "preferences" and found.weights_hash else None
    return None


def _parts_of_method(records: Iterable[Provenance]) -> list[str]:
    """Return a sentence on each pairing and token weighting that the pairs were made with."""
    found = []
    for record in records:
        weights = record.extra.get("weights")
        pairing, weighting = (
            record.extra.get("pairing"),
            weights.get("weighting") if isinstance(weights, dict) else None,
        )
        # One from a user's own file can only be named: the file need not be here.
        if pairing:
            own = f"`{pairing}`, a function of the user's own."
            found.append(
                f"Pairing {describe_function(pairing, PAIRINGS[pairing].pair) if pairing in PAIRINGS else own}"
            )
        if weighting:
            own = f"`{weighting}`, a function of the user's own."
            known = describe_function(weighting, WEIGHTINGS[weighting].weigh) if weighting in WEIGHTINGS else own
            found.append(f"Token weighting {known}")
    return list(dict.fromkeys(found))


def _opponent(name: str, record: Provenance, start: str) -> dict[str, Any]:
    """Return what pairs say of the model that generated their responses, and of how they were made."""
    sampled = ("num_samples", "temperature", "top_p", "max_new_tokens", "seed")
    return {
        "source": name,
        "iteration": record.iteration,
        "weights": record.weights_hash,
        "is_start": start.startswith(record.weights_hash),
        "backend": record.backend,
        "sampling": {key: record.sampling[key] for key in sampled if key in record.sampling},
    }


def _data_table(pieces: list[Piece], names: Mapping[str, str]) -> str:
    rows = []
    for piece in pieces:
        files = split_files(piece.source, piece.split) if is_local(piece.source) else []
        counts = [open_parquet(file).metadata.num_rows for file in files if file.suffix == ".parquet"]
        total = f"{sum(counts)}" if files and len(counts) == len(files) else ""
        digest = hash_text(*content_hashes(files).values()) if files else ""
        listed = files[0].name if len(files) == 1 else str(len(files) or "from the Hub")
        rows.append([names[piece.source], piece.split, piece.use, f"{piece.fraction:g}", listed, total, digest])
    return markdown_table(["source", "split", "use", "fraction", "files", "rows", "content hash"], rows)


def _training_table(program: TrainingProgram, job: TrainingJob, metrics: Mapping[str, Any]) -> str:
    """Return the last training metrics and, if there is a test split, those on it, with their standard errors if known."""
    final = metrics["final"]
    names = ["loss", *program.held_out_metrics(job.settings.arguments)]

    def shown(key: str) -> str:
        value, error = final.get(key), final.get(f"{key}_se")
        if not isinstance(value, int | float):
            return ""
        return f"{value:.4g}" + (f" (standard error {error:.2g})" if isinstance(error, int | float) else "")

    rows = [(name, shown(name), shown(f"eval_{name}")) for name in dict.fromkeys(names)]
    return markdown_table(["metric", "last training log", "test split"], [row for row in rows if any(row[1:])])


def _command(script: str, processes: int) -> str:
    launcher = "python" if processes == 1 else f"accelerate launch --num_processes {processes}"
    return f"{launcher} spin/{script} config.yaml"


def _config(values: Mapping[str, Any], inputs: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return the settings that determine the result as YAML, without the paths of this machine."""
    kept = {key: value for key, value in values.items() if key in inputs or key in _PATHS}
    text = yaml.safe_dump({**portable(kept, names), "output_dir": "output"}, sort_keys=False, allow_unicode=True)
    return text.rstrip("\n")


def _own_version() -> dict[str, str]:
    try:
        return {"selfplay-spin": metadata.version("selfplay-spin")}
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return {}
