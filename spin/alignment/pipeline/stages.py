"""A run as a list of stages: command, inputs, outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin.alignment.core.resolve import module_files
from spin.alignment.core.sides import INITIAL
from spin.alignment.models.folder import model_files
from spin.alignment.pipeline.config import SCORERS_OF_RUN, RunConfig, flags
from spin.alignment.pipeline.manifest import RunManifest
from spin.alignment.pipeline.processes import accelerate_command, python_command

PROGRAMS = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Source:
    """Files whose content a stage depends on; ``name`` is what the manifest calls them. Without files: a Hub name."""

    name: str
    files: Callable[[], list[Path]]


@dataclass(frozen=True)
class Stage:
    """One skippable step. ``folders`` hold partial results, which are moved aside when the inputs have changed."""

    name: str
    commands: list[list[str]]
    settings: dict[str, Any]
    sources: list[Source]
    outputs: Callable[[], list[Path]]
    folders: list[Path]
    program: str
    config_file: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def is_beside(self) -> bool:
        """Whether self-play does not wait for this stage: the control and every scoring."""
        return self.name.startswith("control/") or self.program == "evaluate_model.py"

    @property
    def after(self) -> str:
        """The training whose model this stage needs, if a stage of this run makes it."""
        return "sft/train" if self.name == "control/train" else f"{self.name.partition('/')[0]}/train"

    def inputs(self, manifest: RunManifest) -> dict[str, Any]:
        """Return what the stage is made from: its settings, and the content hash of every source."""
        run_dir = str(manifest.run_dir)
        values = {key: _portable(value, run_dir) for key, value in flatten(self.settings).items()}
        for source in self.sources:
            files = source.files()
            values[f"content of {_portable(source.name, run_dir)}"] = manifest.content_hashes(files) if files else "Hub"
        return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one with dotted keys; leaves become JSON values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | None) else str(value)
    return {key.replace("\n", " "): value for key, value in flat.items()}


def _portable(value: Any, run_dir: str) -> Any:
    """Name places inside the run directory independently of where it lies, so that two runs can be compared."""
    return value.replace(f"{run_dir}/", "RUN/") if isinstance(value, str) else value


def make_stages(config: RunConfig) -> list[Stage]:
    """Return all stages in an order that respects their dependencies."""
    stages: list[Stage] = []
    for name in ("sft", "control"):
        if getattr(config, name) is not None:
            stages += [sft_stage(config, name), *evaluate_stages(config, name, f"{config.run_dir}/{name}/checkpoint")]
    if config.sft is None:
        stages += evaluate_stages(config, "sft", config.model)
    if config.online is not None:
        return [
            *stages,
            online_stage(config),
            *evaluate_stages(config, "online", f"{config.run_dir}/online/checkpoint"),
        ]
    if config.reads_initial:
        stages.append(initial_stage(config))
    for iteration in range(config.iterations):
        stages += [generate_stage(config, iteration), convert_stage(config, iteration)]
        stages += [*weigh_stages(config, iteration), train_stage(config, iteration)]
        stages += evaluate_stages(config, f"iter{iteration}", str(config.iteration_dir(iteration) / "checkpoint"))
    return stages


def model_source(model: str) -> Source:
    return Source(model, lambda: model_files(model))


def data_source(path: str, split: str) -> Source:
    from spin.alignment.data.source_files import split_files

    return Source(f"{path} {split}", lambda: split_files(Path(path), split) if Path(path).exists() else [])


def _launched(config: RunConfig, program: str, arguments: list[str]) -> list[str]:
    launch = config.launch
    return accelerate_command(PROGRAMS / program, arguments, launch.num_processes, launch.config_file)


def initial_stage(config: RunConfig) -> Stage:
    """Responses of the model that the first iteration starts from, made once: the third response of every iteration's pairs."""
    return _generation_stage(config, f"{INITIAL}/generate", 0, config.initial_dir, config.initial_seed)


def generate_stage(config: RunConfig, iteration: int) -> Stage:
    """Responses of the opponent to all training prompts (and the held-out ones with ``data.test_pairs``)."""
    output_dir, seed = config.iteration_dir(iteration) / "generated", config.generation_seed(iteration)
    return _generation_stage(config, f"iter{iteration}/generate", iteration, output_dir, seed)


def _generation_stage(config: RunConfig, name: str, iteration: int, output_dir: Path, seed: int) -> Stage:
    data = config.data
    path, split = data.played(iteration)
    splits = [split] + ([data.test_split] if data.test_pairs else [])
    managed: dict[str, Any] = {
        "model": config.opponent(iteration),
        "revision": config.model_revision if config.opponent(iteration) == config.model else None,
        "output_dir": str(output_dir),
        "iteration": iteration,
        "seed": seed,
    }
    commands, outputs = [], []
    for split in splits:
        held_out = split != data.played(iteration)[1]
        source = {"input_dir": data.test if held_out else path, "split": split}
        section = config.generate | ({"frac_len": 0} if held_out else {})
        commands.append(_launched(config, "generate.py", flags({**managed, **source, "data_frac": "auto", **section})))
        for fraction in range(1 if held_out else num_train_fractions(config, iteration)):
            outputs.append(output_dir / f"{split}-{fraction:05d}.parquet")
    sources = [model_source(managed["model"]), data_source(*data.played(iteration))]
    sources += [data_source(data.test, data.test_split)] if data.test_pairs else []
    return Stage(
        name=name,
        commands=commands,
        settings=managed | config.generate | {"splits": splits},
        sources=sources,
        outputs=lambda: outputs,
        folders=[output_dir],
        program="generate.py",
    )


def num_train_fractions(config: RunConfig, iteration: int) -> int:
    """Return how many fractions the training prompts make; 1 when ``generate.frac_len`` is 0."""
    frac_len = config.generate.get("frac_len") or 0
    if not frac_len:
        return 1
    from spin.alignment.data.fractions import num_fractions
    from spin.alignment.data.rows import stream_prompts

    count = sum(1 for _ in stream_prompts(*config.data.played(iteration), truth_required=False))
    return num_fractions(count, int(frac_len))


def convert_stage(config: RunConfig, iteration: int) -> Stage:
    """Preference rows from the responses."""
    folder = config.iteration_dir(iteration)
    generated, pairs = folder / "generated", folder / "pairs"
    managed = {"input_dir": str(generated), "output_dir": str(pairs)}
    sources = [Source(str(generated), lambda: sorted(generated.glob("*.parquet")))]
    if config.reads_initial:
        managed["initial"] = str(config.initial_dir)
        sources.append(Source(managed["initial"], lambda: sorted(config.initial_dir.glob("*.parquet"))))
    arguments = flags({**managed, **config.convert})
    return Stage(
        name=f"iter{iteration}/convert",
        commands=[python_command(PROGRAMS / "convert_data.py", arguments)],
        settings=dict(config.convert),
        sources=[*sources, *scorer_sources(config.convert), *function_sources(config.convert)],
        outputs=lambda: sorted(pairs.glob("*_prefs-*.parquet")) + sorted(pairs.glob("*.counts.json")),
        folders=[pairs],
        program="convert_data.py",
    )


def scorer_sources(section: Mapping[str, Any]) -> list[Source]:
    """What the scores of a section depend on beside its settings: the scoring model, or the modules of its own rules."""
    from spin.alignment.pairs.annotate import rule_files

    name, model = str(section.get("scorer") or ""), section.get("scorer_model")
    sources = [model_source(str(model))] if model and name != "judge" else []
    return sources + ([Source(f"scorer {name}", lambda: list(rule_files(name).values()))] if ":" in name else [])


# The keys that may name a function of the user's own as module:function.
METHOD_KEYS = ("pairing", "weighting", "loss_type")


def function_sources(section: Mapping[str, Any]) -> list[Source]:
    """The files of the pairing, weighting and loss of a section that are the user's own; the checks have imported them."""
    names = {key: str(section.get(key) or "") for key in METHOD_KEYS}
    return [
        Source(f"{key} {name}", lambda name=name: list(module_files(name).values()))  # type: ignore[misc]
        for key, name in names.items()
        if ":" in name
    ]


def train_stage(config: RunConfig, iteration: int) -> Stage:
    """The policy of the next iteration."""
    folder, values = config.iteration_dir(iteration), config.train_values(iteration)
    sources = pair_sources(config.train_folders(iteration))
    return _training_stage(config, f"iter{iteration}/train", "run_spin.py", folder, values, sources)


def pair_sources(folders: list[str]) -> list[Source]:
    return [
        Source(path, lambda path=path: sorted(Path(path).glob("*_prefs-*.parquet")))  # type: ignore[misc]
        for path in folders
    ]


def weigh_stages(config: RunConfig, iteration: int) -> list[Stage]:
    """Token weights: the two models that find them where the run trains them, the weights, and the forward model's scores.

    The forward model is plain SPIN on the same data: the row beside the one that learns from weighted tokens.
    """
    if config.weigh is None:
        return []
    stages, folder = [], config.iteration_dir(iteration)
    for name in SCORERS_OF_RUN.values() if config.trains_scorers else ():
        values, sources = config.scorer_values(iteration, name), pair_sources(config.pair_folders(iteration))
        stages.append(_training_stage(config, f"iter{iteration}/{name}", "run_spin.py", folder / name, values, sources))
    values = config.weigh_values(iteration)
    models = [values[key] for key in ("model_plus", "model_minus", "tokenizer") if values.get(key)]
    weights, page = Path(values["output_dir"]), Path(values["page"])
    stages.append(
        Stage(
            name=f"iter{iteration}/weigh",
            commands=[_launched(config, "estimate_weights.py", flags(values))],
            settings=values,
            sources=[*map(model_source, models), *pair_sources([values["input_dir"]]), *function_sources(values)],
            outputs=lambda: [*sorted(weights.glob("*_prefs-*.parquet")), *sorted(weights.glob("*.weights.json")), page],
            folders=[weights],
            program="estimate_weights.py",
        )
    )
    if config.trains_scorers:
        name = SCORERS_OF_RUN["plus"]
        stages += evaluate_stages(config, f"iter{iteration}/{name}", str(folder / name / "checkpoint"))
    return stages


def sft_stage(config: RunConfig, name: str) -> Stage:
    """The SFT start, or the control that continues it on the same data."""
    values = config.sft_values(name)
    sources = [data_source(config.data.train, config.data.train_split)]
    return _training_stage(config, f"{name}/train", "run_sft.py", Path(config.run_dir) / name, values, sources)


def online_stage(config: RunConfig) -> Stage:
    """The policy trained step by step on its own labelled responses."""
    values, folder = config.online_values(), Path(config.run_dir) / "online"
    sources = [data_source(*config.data.played()), *scorer_sources(values)]
    if "eval_prompts" in values:
        sources.append(data_source(config.data.test, config.data.test_split))
    return _training_stage(config, "online/train", "run_online.py", folder, values, sources)


def _training_stage(
    config: RunConfig, name: str, program: str, folder: Path, values: dict[str, Any], sources: list[Source]
) -> Stage:
    checkpoint, config_file = folder / "checkpoint", folder / "train.yaml"
    launch = dataclasses.asdict(config.launch)
    launch.pop("parallel")
    return Stage(
        name=name,
        commands=[_launched(config, program, [str(config_file)])],
        settings=values | {"launch": launch},
        sources=[model_source(values["model_name_or_path"]), *sources, *function_sources(values)],
        outputs=lambda: [*model_files(checkpoint), checkpoint / "metrics.json"],
        folders=[checkpoint],
        program=program,
        config_file=config_file,
        config=values,
    )


def evaluate_stages(config: RunConfig, name: str, model: str) -> list[Stage]:
    """The scores of one model on the held-out prompts; nothing when ``data.test`` is empty."""
    if not config.data.test:
        return []
    output_file = Path(config.run_dir) / name / "eval.json"
    managed = {
        "model": model,
        "revision": config.model_revision if model == config.model else None,
        "input_dir": config.data.test,
        "split": config.data.test_split,
        "seed": config.seed,
    }
    arguments = flags({**managed, "output_file": str(output_file), **config.evaluate})
    return [
        Stage(
            name=f"{name}/evaluate",
            commands=[python_command(PROGRAMS / "evaluate_model.py", arguments)],
            settings=managed | config.evaluate,
            sources=[model_source(model), data_source(config.data.test, config.data.test_split)],
            outputs=lambda: [output_file],
            folders=[],
            program="evaluate_model.py",
        )
    ]


def missing_outputs(stage: Stage) -> list[str]:
    """Return the outputs that a stage which says it is done has not left behind."""
    paths = stage.outputs()
    missing = [str(path) for path in paths if not path.is_file()]
    kind = {"evaluate_model.py": ".json", "run_spin.py": ".safetensors", "run_sft.py": ".safetensors"}.get(
        stage.program, ".safetensors" if stage.program == "run_online.py" else ".parquet"
    )
    if not any(path.name.endswith(kind) for path in paths):
        missing.append(f"{stage.folders[0]}/*{kind}")
    return missing
