"""``iterT/generate``: responses of the opponent to the prompts of an iteration, every fraction."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.generation.config import GenerateConfig
from spin.alignment.pipeline.config import RunConfig
from spin.alignment.pipeline.program_settings import generate_config
from spin.alignment.pipeline.stages.base import Stage, StageKind
from spin.alignment.pipeline.stages.sources import data_source, engine_gpus, model_source, needs_ground_truth


class Generate(StageKind):
    program = "generate.py"
    spread = "workers"

    def in_iteration(self, config: RunConfig, iteration: int) -> list[Stage]:
        return [self.stage(config, f"iter{iteration}/generate", generations(config, iteration))]

    def stage(
        self,
        config: RunConfig,
        name: str,
        configs: Sequence[GenerateConfig],
        section: dict[str, Any] | None = None,
        needs: tuple[str, ...] = (),
    ) -> Stage:
        """Return the stage of some generations by one model into one folder; the model is loaded once for each. ``section`` has
        their flags (default: the section ``generate``).
        """
        first = configs[0]
        managed = {key: getattr(first, key) for key in ("model", "revision", "output_dir", "iteration", "seed")}
        return Stage(
            kind=self,
            name=name,
            configs=configs,
            settings=managed
            | (config.generate if section is None else section)
            | config.template_settings
            | {"splits": [item.split for item in configs]},
            sources=[model_source(first.model), *(data_source(item.input_dir, item.split) for item in configs)],
            outputs=functools.partial(fraction_files, configs),
            folder=Path(first.output_dir),
            launch=config.launch.of_engines(),
            iteration=first.iteration,
            needs=needs,
        )

    def gpus(self, config: GenerateConfig) -> int:
        return engine_gpus(config)

    def check_settings(self, config: RunConfig, source: str) -> None:
        generate_config(config, 0).check_files()

    def prompts(self, config: RunConfig) -> dict[tuple[str, str], bool]:
        required = needs_ground_truth(config.convert, "ground_truth")
        return {config.data.played(iteration): required for iteration in config.self_play_iterations}

    def progress(self, stage: Stage) -> str:
        from spin.alignment.pipeline.fraction_status import describe_worker

        paths = stage.outputs()
        complete = sum(path.is_file() for path in paths)
        lines = [describe_worker(record) for record in working(stage)]
        return "\n".join([f"{complete} of {len(paths)} fractions", *lines])

    def seconds_left(self, stage: Stage) -> float | None:
        estimates = [float(record["seconds_left"]) for record in working(stage) if record.get("seconds_left")]
        return max(estimates, default=None)

    def numbers(self, stage: Stage, seconds: float) -> dict[str, float]:
        from spin.alignment.core.parquet import open_parquet
        from spin.alignment.data.response_tokens import response_tokens

        rows = sum(open_parquet(path).metadata.num_rows for path in stage.outputs())
        tokens = sum(map(response_tokens, stage.outputs()))
        return {"responses": rows, "tokens": tokens, "tokens_per_second": tokens / seconds}

    def problems(self, stage: Stage, config: RunConfig) -> list[str]:
        assert stage.folder is not None and stage.iteration is not None
        return decoded_problems(config, stage.iteration, stage.folder)


def working(stage: Stage) -> list[dict[str, Any]]:
    """Return the heartbeats of the processes that work on the fractions of a stage."""
    from spin.alignment.pipeline.fraction_status import workers_of

    assert stage.folder is not None
    return [record for record in workers_of(stage.folder) if record.get("state") == "working"]


def generations(config: RunConfig, iteration: int) -> list[GenerateConfig]:
    """Return the generations of an iteration: its training prompts, and the held-out ones with ``data.test_pairs``."""
    held_out = [generate_config(config, iteration, held_out=True)] if config.data.test_pairs else []
    return [generate_config(config, iteration), *held_out]


def fraction_files(configs: Sequence[GenerateConfig]) -> list[Path]:
    """Return the files that generations write, every fraction of each."""
    return [
        Path(config.output_dir) / f"{config.split}-{number:05d}.parquet"
        for config in configs
        for number in range(_num_fractions(config.input_dir, config.split, config.frac_len))
    ]


@functools.lru_cache(maxsize=16)
def _num_fractions(path: str, split: str, frac_len: int) -> int:
    """Return the number of fractions of a split; 1 if ``frac_len`` is 0."""
    if not frac_len:
        return 1
    from spin.alignment.data.fractions import num_fractions
    from spin.alignment.data.rows import stream_prompts

    return num_fractions(sum(1 for _ in stream_prompts(path, split, ground_truth_required=False)), frac_len)


def decoded_problems(config: RunConfig, iteration: int, folder: Path) -> list[str]:
    """Return the problems of generated rows or pairs, with token ids checked by the tokenizer of the opponent."""
    from spin.alignment.data.chat_encoder import load_encoder
    from spin.alignment.data.template_date import pinned_date
    from spin.alignment.pipeline.data_checks import data_problems

    try:
        encoder = load_encoder(
            config.opponent(iteration),
            system=config.generate.get("system", "keep"),
            chat_template_kwargs=config.chat_template_kwargs,
            date=pinned_date(config.template_date, ()),
        )
        return data_problems(folder, encoder)[1]
    except InputError as error:
        return [str(error)]
