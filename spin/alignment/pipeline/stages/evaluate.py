"""``NAME/evaluate``: the scores of a model on the held-out prompts, if ``data.test`` names any."""

from __future__ import annotations

from pathlib import Path

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json
from spin.alignment.evaluation.config import EvaluateConfig
from spin.alignment.evaluation.harness import find_tasks
from spin.alignment.evaluation.responses import read_responses, responses_path
from spin.alignment.generation import find_backend
from spin.alignment.pipeline.config import LaunchConfig, RunConfig
from spin.alignment.pipeline.program_settings import evaluate_config
from spin.alignment.pipeline.stages.base import Model, Source, Stage, StageKind
from spin.alignment.pipeline.stages.sources import data_source, engine_gpus, model_source, scorer_sources
from spin.alignment.pipeline.stages.training import checkpoint_of

_EXAMPLES = 5
START = "sft"  # the folder of the start's scores


def compared_with(config: RunConfig, model: Model) -> list[str]:
    """Return the folders of the models that a scorer compares a model's responses with: the start, and the iteration before."""
    if config.evaluate.get("win_rate_by") is None or model.role == "start":
        return []
    return [START, *([f"iter{model.iteration - 1}"] if model.role == "policy" and model.iteration else [])]


def _scorer_sources(evaluation: EvaluateConfig) -> list[Source]:
    """The scoring models and the modules of rules that the scores depend on, and the local tasks."""
    found = [
        source
        for scorer in evaluation.scorers.values()
        for source in scorer_sources({"scorer": scorer.name, "scorer_model": scorer.model})
    ]
    folder = evaluation.task_dir
    if folder is not None:
        found.append(Source(folder, lambda: sorted(path for path in Path(folder).rglob("*") if path.is_file())))
    return found


class Evaluate(StageKind):
    program = "evaluate_model.py"
    spread = "group"
    result_suffix = ".json"
    can_run_beside = True

    def at_start(self, config: RunConfig) -> list[Stage]:
        """The model that self-play starts from, if no stage of the run trains it."""
        if config.sft is not None:
            return []
        return self._stages(config, Model("sft", "start", Path(config.run_dir) / START), config.model, ())

    def after_training(self, config: RunConfig, stage: Stage) -> list[Stage]:
        if stage.makes is None or not stage.makes.is_reported:
            return []
        return self._stages(config, stage.makes, str(checkpoint_of(stage)), (stage.name,))

    def _stages(self, config: RunConfig, model: Model, path: str, needs: tuple[str, ...]) -> list[Stage]:
        data, name = config.data, str(model.folder.relative_to(config.run_dir))
        if not data.test:
            return []
        against = compared_with(config, model)
        evaluation = evaluate_config(config, name, path, against)
        managed = {key: getattr(evaluation, key) for key in ("model", "revision", "input_dir", "split", "seed")}
        others = [Source(item, lambda item=item: [responses_path(item)]) for item in evaluation.against]  # type: ignore[misc]
        return [
            Stage(
                kind=self,
                name=f"{name}/evaluate",
                configs=[evaluation],
                settings=managed | config.evaluate | config.template_settings,
                sources=[
                    model_source(path),
                    data_source(data.test, data.test_split),
                    *_scorer_sources(evaluation),
                    *others,
                ],
                outputs=lambda: [Path(evaluation.output_file), responses_path(evaluation.output_file)],
                # The harness shares its requests out itself, so its tasks are run by one process.
                launch=LaunchConfig() if evaluation.tasks else config.launch.of_engines(),
                iteration=model.iteration,
                needs=(*needs, *(f"{other}/evaluate" for other in against)),
                scores=model,
            )
        ]

    def gpus(self, config: EvaluateConfig) -> int:
        return engine_gpus(config)

    def numbers(self, stage: Stage, seconds: float) -> dict[str, float]:
        scores = read_json(stage.configs[0].output_file)
        measured = ("exact", "identical_rate", "truncation_rate", "mean_length")
        by_temperature = {
            f"{name}_t{temperature}": values[name]
            for temperature, values in scores["temperatures"].items()
            for name in measured
            if name in values
        }
        return by_temperature | ({"nll": scores["nll"]} if "nll" in scores else {})

    def examples(self, stage: Stage) -> list[dict[str, str]]:
        stored = read_responses(responses_path(stage.configs[0].output_file))
        columns = ("prompt", "ground_truth", "response")
        rows = [*stored.by_prompt.values()][:_EXAMPLES]
        return [{name: str(row[name] if row[name] is not None else "") for name in columns} for row in rows]

    def problems(self, stage: Stage, config: RunConfig) -> list[str]:
        """Check that every held-out prompt has a stored response at every temperature."""
        result, path = Path(stage.configs[0].output_file), responses_path(stage.configs[0].output_file)
        if not path.exists():  # evaluated by a version that stored no responses
            return []
        try:
            evaluation, responses = read_json(result), read_responses(path)
            samples = stage.configs[0].num_samples
            expected = {t: evaluation["n"] * (samples if float(t) else 1) for t in evaluation["temperatures"]}
        except InputError as error:
            return [str(error)]
        except (KeyError, TypeError):
            return [f"{result} is damaged: `spin run` with the configuration of this run makes it again"]
        found = {
            temperature: sum(len(responses.all_of(temperature, name)) for name in rows)
            for temperature, rows in responses.by_temperature.items()
        }
        return [] if found == expected else [f"{path} has {found} responses by temperature, but {result} {expected}"]

    def check_settings(self, config: RunConfig, source: str) -> None:
        evaluation = evaluate_config(config, START, config.start_model)
        if find_backend(evaluation.backend).needs_server:
            raise InputError(
                f"evaluate.backend is {evaluation.backend}, whose server has one model, but a run evaluates several: choose "
                "transformers or vllm"
            )
        evaluation.check_metric()
        if evaluation.tasks:
            find_tasks(evaluation)

    def prompts(self, config: RunConfig) -> dict[tuple[str, str], bool]:
        # Other readers of the held-out prompts need every row; an evaluation skips those that it cannot use.
        read_by_others = bool(config.data.test and config.data.test_pairs)
        return {(config.data.test, config.data.test_split): True} if read_by_others else {}
