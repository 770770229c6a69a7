"""The stages of a run in order, each with what it needs; rows flow from stage to stage as their files will."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from spin.alignment.evaluation.config import EvaluateConfig
from spin.alignment.generation import find_backend
from spin.alignment.generation.config import GenerateConfig
from spin.alignment.methods.losses import find_loss
from spin.alignment.methods.pairings import find_pairing
from spin.alignment.pairs.config import ConvertConfig, SelectConfig
from spin.alignment.pipeline.config import RunConfig
from spin.alignment.pipeline.planning import arithmetic
from spin.alignment.pipeline.planning.arithmetic import Lengths, ModelShape
from spin.alignment.pipeline.planning.demands import (
    Demand,
    Sampled,
    Trained,
    convert_demand,
    disk_formula,
    sample_demand,
    train_demand,
)
from spin.alignment.pipeline.planning.devices import Fleet
from spin.alignment.pipeline.planning.memory import parallelism
from spin.alignment.pipeline.planning.workload import Split
from spin.alignment.pipeline.stages import Stage, make_stages
from spin.alignment.token_weights.config import WeightsConfig

_TRAINING_EPOCHS = 3.0  # transformers' default of num_train_epochs
_ENGINE_SHARE = 0.9  # of a GPU's memory, for engines without a setting of their own


@dataclass
class _Walk:
    """A walk through the stages. ``rows`` are those in the folders that stages have written so far."""

    config: RunConfig
    shape: ModelShape
    splits: Mapping[tuple[str, str], Split]
    fleet: Fleet
    rows: dict[str, tuple[int, Lengths]] = field(default_factory=dict)

    def demand(self, stage: Stage) -> Demand:
        """Return what a stage needs; only its name for a program that is not known here."""
        first, program = stage.configs[0], stage.kind.program
        makers: dict[type, Callable[[Stage], Demand]] = {
            GenerateConfig: self.generate,
            ConvertConfig: self.convert,
            SelectConfig: self.select,
            WeightsConfig: self.weigh,
            EvaluateConfig: self.evaluate,
        }
        if type(first) in makers:
            return makers[type(first)](stage)
        if program == "run_online.py":
            return self.online(stage)
        if program in ("run_spin.py", "run_sft.py"):
            return self.train(stage, first)
        return Demand(stage.name, program, remarks=[f"{program} is not known here: nothing is counted for it"])

    def generate(self, stage: Stage) -> Demand:
        """All generations of a stage: training prompts, and held-out ones with ``data.test_pairs``."""
        return _sum([self._generation(stage, item) for item in stage.configs])

    def _generation(self, stage: Stage, item: GenerateConfig) -> Demand:
        split = self.splits[item.input_dir, item.split]
        itemsize = _itemsize(item.dtype, self.config.train)
        work = Sampled(
            split.prompts,
            item.num_samples,
            split.lengths,
            item.max_new_tokens,
            itemsize,
            item.tensor_parallel_size,
            item.gpu_memory_utilization,
            item.batch_size,
        )
        demand = sample_demand(stage.name, stage.kind.program, self.shape, work, self.fleet)
        lengths, rows = work.bounded, demand.responses or 0
        store = arithmetic.prompt_store_bytes(split.prompts, lengths)
        demand.disk = arithmetic.row_bytes(rows, lengths) + store
        demand.formulas.append(f"{disk_formula(rows, 'rows', lengths)}; + the prompt store, {store / 1e6:.0f} MB")
        if find_backend(item.backend).needs_server:
            demand.remarks.append("generation runs on the server at base_url: its memory and time are the server's")
        launch = self.config.launch
        engines = launch.of_engines().num_processes // launch.nodes * self.fleet.nodes
        if item.tensor_parallel_size > 1 and self.fleet.engines(item.tensor_parallel_size) < engines:
            demand.remarks.append(
                f"{engines} engines of {item.tensor_parallel_size} GPUs need more GPUs than there are: set "
                "launch.generate_processes"
            )
        known = self.rows.get(item.output_dir, (0, lengths))[0]
        self.rows[item.output_dir] = (known + rows, lengths)
        return demand

    def convert(self, stage: Stage) -> Demand:
        (item,) = stage.configs
        rows, lengths = self.rows[item.input_dir]
        samples = self.config.generate.get("num_samples", 1)
        pairs = rows * pairs_per_prompt(item.pairing, samples) // samples
        self.rows[item.output_dir] = (pairs, lengths)
        return convert_demand(stage.name, rows, pairs, lengths, item.scorer)

    def select(self, stage: Stage) -> Demand:
        (item,) = stage.configs
        rows, lengths = self.rows[item.input_dir]
        self.rows[item.output_dir] = (rows, lengths)
        demand = convert_demand(stage.name, rows, rows, lengths, item.scorer)
        demand.program = stage.kind.program
        demand.remarks.append("as if the scorer accepted every response")
        return demand

    def weigh(self, stage: Stage) -> Demand:
        """Token weights: a forward pass of two frozen models, if the weighting compares models."""
        (item,) = stage.configs
        rows, lengths = self.rows[item.input_dir]
        self.rows[item.output_dir] = (rows, lengths)
        answers = lengths.ground_truth + lengths.response
        models = 2 if self.config.weighting.needs_models else 0
        tokens = rows * (lengths.prompt + answers)
        flops = models * arithmetic.forward_flops(
            self.shape, tokens, rows * answers, (lengths.prompt + answers / 2) / 2
        )
        disk = arithmetic.row_bytes(rows, lengths) + 4 * rows * answers
        demand = Demand(stage.name, stage.kind.program, pairs=rows, tokens=models * tokens, flops=flops, disk=disk)
        demand.processes = self.fleet.processes
        demand.formulas.append(
            f"FLOPs = {models} models x 2 x weights x {tokens:,.0f} tokens; disk: pairs, and 4 B per weight"
        )
        if self.fleet.flops_per_second:
            demand.seconds = flops / self.fleet.flops_per_second
        return demand

    def evaluate(self, stage: Stage) -> Demand:
        """Held-out responses at every temperature, and the log-likelihood of the ground truth."""
        (item,) = stage.configs
        split = self.splits[item.input_dir, item.split]
        prompts = min(item.limit or split.prompts, split.prompts)
        samples = sum(item.num_samples if temperature else 1 for temperature in item.temperatures)
        itemsize = _itemsize(item.dtype, self.config.train)
        work = Sampled(
            *(prompts, samples, split.lengths, item.max_new_tokens, itemsize, item.tensor_parallel_size),
            memory_share=_ENGINE_SHARE,
            sequences=item.batch_size,
        )
        # Benchmarks of the harness make it one process, however many GPUs there are.
        fleet = replace(self.fleet, processes=max(1, item.tensor_parallel_size)) if item.tasks else self.fleet
        demand = sample_demand(stage.name, stage.kind.program, self.shape, work, fleet)
        answers = prompts * split.lengths.ground_truth
        tokens = prompts * split.lengths.prompt + answers
        scored = arithmetic.forward_flops(self.shape, tokens, answers, tokens / max(1, prompts) / 2)
        demand.flops, demand.tokens = (demand.flops or 0) + scored, (demand.tokens or 0) + tokens
        demand.disk = arithmetic.row_bytes(demand.responses or 0, work.bounded)
        demand.formulas.append(f"+ one forward pass over {tokens:,.0f} tokens for the NLL of the ground truth")
        if demand.seconds is not None and fleet.flops_per_second:
            demand.seconds += scored / fleet.flops_per_second
        for key in ("tasks", "win_rate_by"):
            if getattr(item, key):
                demand.remarks.append(f"the time of {key} is not counted")
        return demand

    def train(self, stage: Stage, values: Mapping[str, Any]) -> Demand:
        """Preference training on the pairs of its folders, or SFT on prompts with ground truth."""
        is_sft = stage.kind.program == "run_sft.py"
        rows, lengths = 0, None
        for folder, share in values["dataset_mixer"].items():
            count, lengths = self.rows.get(folder) or self._prompts(folder, values["dataset_splits"][0])
            rows += round(share * count)
        assert lengths is not None
        # A control trained on selected responses learns them in place of the ground truth.
        if is_sft and values["dataset_mixer"].keys() <= self.rows.keys():
            lengths = replace(lengths, ground_truth=lengths.response)
        lengths = lengths.truncated(int(values.get("max_length", 1024)), int(values.get("max_prompt_length", 512)))
        needs_reference = not is_sft and find_loss(str(values.get("loss_type", "sigmoid"))).needs_reference
        work = Trained(rows, self._passes(values, rows), 1 if is_sft else 2, lengths, values, needs_reference)
        layout = parallelism(self.config.launch, self.fleet.processes)
        return train_demand(stage.name, stage.kind.program, self.shape, work, layout, self.fleet)

    def online(self, stage: Stage) -> Demand:
        """Online training: what its steps sample, and a pair of every prompt that they train on."""
        (values,) = stage.configs
        path, split = next(iter(values["dataset_mixer"])), values["dataset_splits"][0]
        found, fleet = self.splits[path, split], self.fleet
        passes = self._passes(values, found.prompts)
        seen = round(passes * found.prompts)
        itemsize, limit = _itemsize("auto", values), int(values.get("max_new_tokens", 256))
        samples = int(values.get("num_samples", 2))
        work = Sampled(
            seen, samples, found.lengths, limit, itemsize, 1, _ENGINE_SHARE, values.get("generation_batch_size")
        )
        sampled = sample_demand(stage.name, stage.kind.program, self.shape, work, fleet)
        # Both responses of a pair are the model's own.
        lengths = replace(work.bounded, ground_truth=work.bounded.response)
        keeps_reference = values.get("ref_update_freq", 1) != 1 or values.get("async_steps", 0) > 0
        trained = Trained(seen, 1, 2, lengths, values, needs_reference=keeps_reference)
        layout = parallelism(self.config.launch, fleet.processes)
        update = train_demand(stage.name, stage.kind.program, self.shape, trained, layout, fleet)
        return _sum([sampled, update])

    def _prompts(self, path: str, split: str) -> tuple[int, Lengths]:
        found = self.splits[path, split]
        return found.prompts, found.lengths

    def _passes(self, values: Mapping[str, Any], rows: int) -> float:
        steps = int(values.get("max_steps", -1))
        if steps <= 0:
            return float(values.get("num_train_epochs", _TRAINING_EPOCHS))
        batch = int(values.get("per_device_train_batch_size", 8)) * int(values.get("gradient_accumulation_steps", 1))
        return steps * batch * self.fleet.processes / max(1, rows)


def pairs_per_prompt(pairing: str, samples: int) -> int:
    """Return the most pairs that a pairing makes of ``samples`` responses to a prompt."""
    found = find_pairing(pairing)
    if found.even:
        return samples // 2
    return samples if found.needs_ground_truth and not found.needs else 1


def _itemsize(dtype: str, training: Mapping[str, Any]) -> int:
    """Return the bytes of a weight for sampling; ``auto`` is the precision that trained models are saved in."""
    if dtype == "auto":
        dtype = "bfloat16" if training.get("bf16") or training.get("dtype") == "bfloat16" else "float32"
    return 2 if dtype in ("bfloat16", "float16") else 4


def _sum(demands: list[Demand]) -> Demand:
    """Return the sum of what is needed one after the other: the largest memory, the sum of everything else."""
    first, *others = demands
    for other in others:
        for name in ("prompts", "responses", "pairs", "tokens", "flops", "disk"):
            values = [value for value in (getattr(first, name), getattr(other, name)) if value is not None]
            setattr(first, name, sum(values) if values else None)
        known = first.seconds is not None and other.seconds is not None
        first.seconds = (first.seconds or 0) + (other.seconds or 0) if known else None
        first.memory = max(first.memory or 0, other.memory or 0)
        first.host = max(first.host, other.host)
        first.fits = bool(first.fits) and bool(other.fits)
        first.formulas += other.formulas
        first.remarks += other.remarks
    return first


def plan_stages(
    config: RunConfig, shape: ModelShape, splits: Mapping[tuple[str, str], Split], fleet: Fleet
) -> list[Demand]:
    """Return what every stage of a run needs, in order.

    Args:
        shape: of the model that the run starts from; all of its models have it.
        splits: the prompts by (data set, split): those of :func:`splits_of`.
    """
    walk = _Walk(config, shape, splits, fleet)
    return [walk.demand(stage) for stage in make_stages(config)]


def splits_of(config: RunConfig) -> list[tuple[str, str]]:
    """Return the (data set, split) of all prompts that the stages of a run read."""
    data = config.data
    iterations = config.self_play_iterations or range(1)
    found = [(data.train, data.train_split), *(data.played(iteration) for iteration in iterations)]
    return list(dict.fromkeys([*found, *([(data.test, data.test_split)] if data.test else [])]))
