"""``iterT/generate``: responses of the opponent to the prompts of an iteration, every fraction."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.pipeline.config import RunConfig, flags
from spin.alignment.pipeline.stages.base import Stage, StageKind
from spin.alignment.pipeline.stages.sources import data_source, model_source, needs_ground_truth


class Generate(StageKind):
    program = "generate.py"

    def in_iteration(self, config: RunConfig, iteration: int) -> list[Stage]:
        output_dir, seed = config.iteration_dir(iteration) / "generated", config.generation_seed(iteration)
        return [self.stage(config, f"iter{iteration}/generate", iteration, output_dir, seed)]

    def stage(self, config: RunConfig, name: str, iteration: int, output_dir: Path, seed: int) -> Stage:
        """Return the stage that lets the opponent of an iteration answer its prompts.

        All training prompts, and the held-out ones with ``data.test_pairs``; the model is loaded once for each split.
        """
        data, opponent = config.data, config.opponent(iteration)
        path, split = data.played(iteration)
        managed: dict[str, Any] = {
            "model": opponent,
            "revision": config.model_revision if opponent == config.model else None,
            "output_dir": str(output_dir),
            "iteration": iteration,
            "seed": seed,
        }
        shared = managed | {"data_frac": "auto"} | config.generate
        configs = [shared | {"input_dir": path, "split": split}]
        sources = [model_source(opponent), data_source(path, split)]
        if data.test_pairs:
            configs.append(shared | {"input_dir": data.test, "split": data.test_split, "frac_len": 0})
            sources.append(data_source(data.test, data.test_split))
        return Stage(
            kind=self,
            name=name,
            configs=configs,
            settings=managed | config.generate | {"splits": [item["split"] for item in configs]},
            sources=sources,
            outputs=functools.partial(fraction_files, configs),
            folder=output_dir,
            launch=config.launch,
            iteration=iteration,
        )

    def check_settings(self, config: RunConfig, source: str) -> None:
        from spin.alignment.generation.generate import check_options

        check_options(sampling_options(config))

    def prompts(self, config: RunConfig) -> dict[tuple[str, str], bool]:
        required = needs_ground_truth(config.convert, "ground_truth")
        return {config.data.played(iteration): required for iteration in config.self_play_iterations}

    def progress(self, stage: Stage) -> str:
        from spin.alignment.pipeline.fraction_status import describe_worker, workers_of

        paths = stage.outputs()
        complete = sum(path.is_file() for path in paths)
        assert stage.folder is not None
        lines = [describe_worker(record) for record in workers_of(stage.folder) if record.get("state") == "working"]
        return "\n".join([f"{complete} of {len(paths)} fractions", *lines])

    def problems(self, stage: Stage, config: RunConfig) -> list[str]:
        assert stage.folder is not None and stage.iteration is not None
        return decoded_problems(config, stage.iteration, stage.folder)


def sampling_options(config: RunConfig) -> Any:
    """Return the options of generate.py as its parser reads them."""
    from spin.alignment.generation.generate import make_parser

    managed = ["--model", config.model, "--input_dir", config.data.train, "--output_dir", config.run_dir]
    return make_parser().parse_args([*managed, *flags(config.generate)])


def fraction_files(configs: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Return the files that generations write, every fraction of each."""
    return [
        Path(config["output_dir"]) / f"{config['split']}-{number:05d}.parquet"
        for config in configs
        for number in range(_num_fractions(config["input_dir"], config["split"], int(config.get("frac_len") or 0)))
    ]


@functools.lru_cache(maxsize=16)
def _num_fractions(path: str, split: str, frac_len: int) -> int:
    """Return how many fractions the prompts of a split make; 1 when ``frac_len`` is 0."""
    if not frac_len:
        return 1
    from spin.alignment.data.fractions import num_fractions
    from spin.alignment.data.rows import stream_prompts

    return num_fractions(sum(1 for _ in stream_prompts(path, split, truth_required=False)), frac_len)


def decoded_problems(config: RunConfig, iteration: int, folder: Path) -> list[str]:
    """Return what is wrong with generated rows or pairs, token ids checked with the tokenizer of the opponent."""
    from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
    from spin.alignment.pipeline.data_checks import data_problems

    try:
        encoder = ChatEncoder(load_tokenizer(config.opponent(iteration)), config.generate.get("system", "keep"))
        return data_problems(folder, encoder)[1]
    except InputError as error:
        return [str(error)]
