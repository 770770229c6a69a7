"""``spin push``: uploads a model or pairs to the Hugging Face Hub, or writes the folder that would be uploaded."""

from __future__ import annotations

from pathlib import Path

from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError
from spin.alignment.core.upload import Upload, check_repository, make_upload, push, write_folder
from spin.alignment.models.folder import check_model_path, published_model
from spin.alignment.pipeline.config import open_run
from spin.alignment.pipeline.stages import make_stages, models_of
from spin.alignment.pipeline.stages.training import checkpoint_of


def push_folder(source: Path, repository: str, private: bool, model: str | None, folder: Path | None) -> None:
    """Upload a model or pairs, or write what would be uploaded to ``folder``; offline, to a folder named after the repository.

    Args:
        source: a run (its last policy, or the one called ``model``), a model folder, or a folder of pairs.

    Raises:
        InputError: there is nothing to push, a name cannot be used, or the Hub refuses.
    """
    from huggingface_hub import constants

    check_repository(repository, "--repo")
    upload = find_upload(source, model)
    if folder is None and not constants.HF_HUB_OFFLINE:
        name = push(upload, repository, private or None)
        say(f"pushed {len(upload.files)} files of {upload.folder} to the {upload.kind} repository {name}")
        return
    out = folder or Path(f"{repository.rpartition('/')[2]}-push")
    write_folder(upload, out)
    why = "" if folder is not None else "HF_HUB_OFFLINE is set, so nothing was pushed; "
    prefix = "" if upload.kind == "model" else "--repo-type dataset "
    say(f"{why}wrote the folder that would be pushed: {out} (upload it with: hf upload {prefix}{repository} {out})")


def find_upload(source: Path, model: str | None) -> Upload:
    """Return what is uploaded of a run, a model folder or a folder of pairs: no optimiser states, logs or stored log-probs.

    Raises:
        InputError: the source is none of these, or is not complete.
    """
    if (source / "run.yaml").is_file():
        return published_model(_model_of_run(source, model))
    if model is not None:
        raise InputError(f"--model names a model of a run, and {source} is no run: remove it")
    if not source.is_dir():
        raise InputError(f"{source} is not a folder: give a run, a model folder or a folder of pairs")
    pairs = sorted(source.glob("*_prefs*.parquet"))
    if pairs:
        records = (path for name in ("*_prefs.counts.json", "*_prefs.weights.json") for path in source.glob(name))
        return make_upload(source, [*pairs, *records], "dataset")
    check_model_path(f"{source.absolute()}")
    return published_model(source)


def _model_of_run(run_dir: Path, name: str | None) -> Path:
    stages = make_stages(open_run(run_dir))
    folders = {stage.makes.name: checkpoint_of(stage) for stage in stages if stage.makes is not None}
    policies = [model.name for model in models_of(stages) if model.role == "policy"]
    chosen = name if name is not None else (policies or list(folders))[-1]
    if chosen not in folders:
        raise InputError(f"the run {run_dir} trains no model '{chosen}': give one of {', '.join(folders)}")
    if not (folders[chosen] / "metrics.json").is_file():
        raise InputError(f"the model {chosen} of the run {run_dir} is not complete: finish the run first")
    return folders[chosen]
