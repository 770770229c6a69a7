"""``spin plan``: what every stage of a run will need, before anything is started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError
from spin.alignment.core.machine import GIB, size_text, weights_text
from spin.alignment.models.folder import model_folder, read_config_file
from spin.alignment.pipeline.config import RunConfig, load_run_config, open_run
from spin.alignment.pipeline.planning.arithmetic import FAMILIES, ModelShape, shape_of
from spin.alignment.pipeline.planning.demands import Demand
from spin.alignment.pipeline.planning.devices import Device, Fleet, make_fleet
from spin.alignment.pipeline.planning.options import PlanOptions, split_arguments
from spin.alignment.pipeline.planning.rates import apply_rates, measured_rates
from spin.alignment.pipeline.planning.stages import plan_stages, splits_of
from spin.alignment.pipeline.planning.workload import ASSUMED_TEST, Split, given_split, read_split


@dataclass(frozen=True)
class Plan:
    """The plan of a run: what each stage needs on which devices, and where its prompts were counted."""

    demands: list[Demand]
    fleet: Fleet
    shape: ModelShape
    sources: list[str]


def make_plan(path: str | Path, arguments: Sequence[str] = ()) -> Plan:
    """Return the plan of the configuration at ``path``; ``arguments`` are options of ``spin plan`` and overrides.

    Raises:
        InputError: the configuration, an option or the model's config.json is wrong, or the prompts cannot be counted.
    """
    options, overrides = split_arguments(arguments)
    config = load_run_config(path, overrides)
    launch = config.launch
    processes, nodes = launch.num_processes // launch.nodes, options.nodes or launch.nodes
    fleet = make_fleet(options.gpu, options.gpus, nodes, options.gpu_memory, options.peak_tflops, processes)
    fleet = replace(fleet, utilization=options.utilization)
    if launch.generate_processes is not None and fleet.gpus is None:
        fleet = replace(fleet, gpus=fleet.processes)  # engines of several GPUs share those of the training
    shape, splits = model_shape(config, options.model_config), read_splits(config, options)
    demands = plan_stages(config, shape, splits, fleet)
    if options.rates is not None:
        apply_rates(demands, rates_of(options.rates))
    return Plan(demands, fleet, shape, [found.source for found in splits.values()])


def model_shape(config: RunConfig, given: str | None = None) -> ModelShape:
    """Return the shape of the model that a run starts from; of a family without formulas, its weights are counted on the meta
    device.

    Raises:
        InputError: its config.json cannot be had, or describes no model that can be counted.
    """
    if given is not None:
        path = Path(given)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"--model_config {given} cannot be read as JSON ({error}): give a model's config.json"
            ) from error
        if not isinstance(values, dict):
            raise InputError(f"--model_config {given} is not a JSON object: give a model's config.json")
        return shape_of(values, given)
    try:
        folder = model_folder(config.model, config.model_revision, needs_weights=False)
    except InputError as error:
        raise InputError(f"{error}; or give its config.json, or that of a similar one, with --model_config") from error
    values = read_config_file(folder)
    if values.get("model_type") in FAMILIES:
        return shape_of(values, str(folder / "config.json"))
    return counted_shape(folder)


def counted_shape(folder: Path) -> ModelShape:
    """Return the shape of any causal language model that transformers can build, counted without memory for its weights.

    Raises:
        InputError: it cannot be built.
    """
    from spin.alignment.models.weights_check import check_model, meta_model

    config = check_model(folder, needs_weights=False)
    model = meta_model(folder, config, "causal", trust_remote_code=False)
    text = config.get_text_config()
    if model is None or not hasattr(text, "num_hidden_layers"):
        raise InputError(
            f"{folder / 'config.json'} describes a model that cannot be counted: give --model_config of a similar one"
        )
    table = model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings()
    tied = head is None or head.weight is model.get_input_embeddings().weight
    width = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    layers = (
        sum(weight.numel() for weight in model.parameters()) - (1 if tied else 2) * table
    ) // text.num_hidden_layers
    return ModelShape(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        intermediate=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        vocab=table // text.hidden_size,
        query_width=width * text.num_attention_heads,
        key_width=width * int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        layer_weights=layers,
        final_weights=0,
        tied=tied,
    )


def read_splits(config: RunConfig, options: PlanOptions) -> dict[tuple[str, str], Split]:
    """Return the prompts of a run by (data set, split): of the data where it is here, else as the options say.

    Raises:
        InputError: data that cannot be read, or that is not here and of which the options do not say how much there is.
    """
    from spin.alignment.data.chat_encoder import load_encoder
    from spin.alignment.data.source_names import is_local

    wanted = splits_of(config)
    encoder = None
    if options.model_config is None and any(is_local(path) for path, _ in wanted):
        trusted = bool(config.generate.get("trust_remote_code"))
        system = config.generate.get("system", "keep")
        template = {"system": system, "chat_template_kwargs": config.chat_template_kwargs}
        encoder = load_encoder(config.model, config.model_revision, trusted, **template)
    splits = {}
    for path, split in wanted:
        found = read_split(path, split, encoder)
        is_test = (path, split) == (config.data.test, config.data.test_split)
        prompts = options.test_prompts if is_test else options.prompts
        if is_test and found is None and prompts is None:
            prompts = ASSUMED_TEST
        given = (prompts, options.prompt_tokens, options.response_tokens)
        splits[path, split] = given_split(found, f"{path} (split {split})", *given)
    return splits


def rates_of(run_dir: str) -> dict[str, float]:
    """Return the rates that the stages of an earlier run reached, by program.

    Raises:
        InputError: the folder contains no run with a finished stage.
    """
    config = open_run(run_dir)
    fleet = Fleet(Device("measured", 0, 0, 1), config.launch.num_processes, 1)
    demands = plan_stages(config, model_shape(config), read_splits(config, PlanOptions()), fleet)
    return measured_rates(run_dir, demands)


COLUMNS = ("stage", "prompts", "responses", "pairs", "tokens", "FLOPs", "disk", "memory", "fits", "time")


def row_of(demand: Demand) -> tuple[str, ...]:
    """Return the cells of a stage under ``COLUMNS``; a dash for what does not apply, a question mark for what is not known."""
    counts = [_count(value) for value in (demand.prompts, demand.responses, demand.pairs, demand.tokens)]
    memory = "-" if demand.memory is None else memory_text(demand, demand.memory)
    fits = "-" if demand.fits is None else "yes" if demand.fits else "NO"
    flops = "-" if demand.flops is None else f"{demand.flops:.1e}"
    return (demand.stage, *counts, flops, size_text(demand.disk), memory, fits, time_text(demand.seconds))


def total_row(demands: Iterable[Demand]) -> tuple[str, ...]:
    """Return the cells of the sums under ``COLUMNS``."""
    found = list(demands)
    tokens, flops, disk = (sum(getattr(item, name) or 0 for item in found) for name in ("tokens", "flops", "disk"))
    unknown = any(item.seconds is None for item in found)
    seconds = None if unknown else sum(item.seconds or 0 for item in found)
    fits = "NO" if any(item.fits is False for item in found) else "yes"
    return ("total", "", "", "", _count(tokens), f"{flops:.1e}", size_text(disk), "", fits, time_text(seconds))


def _count(value: float | None) -> str:
    if value is None:
        return "-"
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:,.0f}"


def memory_text(demand: Demand, memory: float) -> str:
    """Return the memory of a process: of each of its devices, and of the host if something is offloaded to it."""
    text = f"{memory / GIB:.1f} GiB"
    if demand.devices > 1:
        text = f"{demand.devices} x {text}"
    return f"{text} + {demand.host / GIB:.0f} host" if demand.host else text


def time_text(seconds: float | None) -> str:
    """Return a time in hours, or in seconds below six minutes; a question mark if it is not known."""
    if seconds is None:
        return "?"
    return f"{seconds / 3600:,.1f} h" if seconds >= 360 else f"{seconds:,.1f} s"


def show_plan(path: str, arguments: Sequence[str]) -> None:
    """Print the plan of a configuration as a table."""
    options, overrides = split_arguments(arguments)
    plan = make_plan(path, arguments)
    device = plan.fleet.device
    peak = f"{device.tflops:g} TFLOP/s at {plan.fleet.utilization:.0%}" if device.tflops else "peak not known"
    say(f"{path}: model of {weights_text(plan.shape.weights)}")
    say(f"devices: {plan.fleet.processes} x {device.name}, {device.memory:.0f} GiB each, {peak}")
    for source in plan.sources:
        say(f"prompts: {source}")
    rows = [COLUMNS, *map(row_of, plan.demands), total_row(plan.demands)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        say("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    for remark in dict.fromkeys(remark for item in plan.demands for remark in item.remarks):
        say(f"remark: {remark}")
    if not device.tflops and options.rates is None:
        say("remark: times of models need --gpu, --peak_tflops or --rates")
    config = load_run_config(path, overrides)
    if plan.fleet.nodes > 1 and config.launch.nodes == 1:
        say("remark: spin run starts its programs on one machine unless launch.nodes and launch.cluster say otherwise")
    _say_disk(config, sum(item.disk for item in plan.demands))
    if options.explain:
        _say_formulas(plan.demands)


def _say_formulas(demands: Iterable[Demand]) -> None:
    """Print the formulas of every stage, or the earlier stage that has the same."""
    known: dict[tuple[str, ...], str] = {}
    for item in demands:
        lines = tuple(item.formulas)
        if lines in known:
            say(f"{item.stage}: as {known[lines]}")
            continue
        known[lines] = item.stage
        say(f"{item.stage}:")
        for line in lines:
            say(f"  {line}")


def _say_disk(config: RunConfig, needed: float) -> None:
    run_dir = Path(config.run_dir).absolute()
    where = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    say(f"disk: {size_text(needed)} needed, {size_text(shutil.disk_usage(where).free)} free in {where}")
