"""What each stage of a run needs: rows, tokens, FLOPs, bytes and memory, with the formula of every number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from spin.alignment.core.machine import GIB
from spin.alignment.pipeline.planning import arithmetic
from spin.alignment.pipeline.planning.arithmetic import Lengths, ModelShape
from spin.alignment.pipeline.planning.devices import Fleet
from spin.alignment.pipeline.planning.memory import Parallelism

# Rows per second of gathering and pairing on a core without a scorer: 100,000 rows in benchmarks/results/generate-scale-cpu.json.
GATHERED_PER_SECOND = 34_000


@dataclass
class Demand:
    """What one stage needs. Numbers are None where they do not apply or are not known.

    Attributes:
        stage: its name in the run, such as iter0/train; ``program`` is what it starts.
        tokens: tokens that pass through the model, prompts included, in all epochs.
        flops: of the model's passes.
        disk: bytes that it leaves on the disk.
        memory: bytes on one device of a process, which has ``devices`` of them; ``host`` are further ones in the host's memory.
        fits: whether the memory fits the device.
        seconds: of the whole stage on the fleet.
        formulas: one line for each number.
        remarks: what is not counted.
        processes: that share the work.
    """

    stage: str
    program: str
    prompts: int | None = None
    responses: int | None = None
    pairs: int | None = None
    tokens: float | None = None
    flops: float | None = None
    disk: float = 0.0
    memory: float | None = None
    host: float = 0.0
    devices: int = 1
    fits: bool | None = None
    seconds: float | None = None
    formulas: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    processes: int = 1


@dataclass(frozen=True)
class Sampled:
    """What a stage that samples does with its prompts; ``sequences`` is the limit of those decoded together, if it is set."""

    prompts: int
    samples: int
    lengths: Lengths
    max_new_tokens: int
    itemsize: int
    tensor_parallel: int
    memory_share: float
    sequences: int | None = None

    @property
    def bounded(self) -> Lengths:
        """The lengths with responses of at most ``max_new_tokens``; without a ground truth to go by, exactly that."""
        expected = self.lengths.response or float(self.max_new_tokens)
        return replace(self.lengths, response=min(expected, float(self.max_new_tokens)))


def sample_demand(stage: str, program: str, shape: ModelShape, work: Sampled, fleet: Fleet) -> Demand:
    """Return what generating needs: prefilling is limited by FLOPs, decoding by FLOPs or by reading weights and cache.

    It does not fit either if there are fewer GPUs than one engine takes.
    """
    lengths, responses = work.bounded, work.prompts * work.samples
    prefill, decode = arithmetic.generation_flops(shape, work.prompts, work.samples, lengths)
    group = work.tensor_parallel
    memory = fleet.device.memory * GIB * work.memory_share * group
    cached = shape.cache_numbers * work.itemsize
    engines = fleet.engines(group)
    most = min(work.sequences or arithmetic.LARGEST_BATCH, -(-responses // max(1, engines)))
    engine = arithmetic.decoding(shape, work.itemsize, lengths, memory, most)
    least = shape.weights * work.itemsize + cached * (lengths.prompt + work.max_new_tokens)
    demand = Demand(
        stage,
        program,
        prompts=work.prompts,
        responses=responses,
        tokens=work.prompts * lengths.prompt + responses * lengths.response,
        flops=prefill + decode,
        memory=least / group,
        devices=group,
        fits=least <= memory and engines > 0,
        processes=fleet.processes,
    )
    attended = f"attending to {lengths.prompt + lengths.response / 2:.0f}"
    demand.formulas += [
        f"responses = {work.prompts:,} prompts x {work.samples} = {responses:,}",
        f"tokens = {work.prompts:,} x {lengths.prompt:.0f} (prompt) + {responses:,} x {lengths.response:.0f} (response)",
        f"FLOPs = 2 x {_billions(shape.weights)} weights per token + 4 x {shape.query_width:,} x {shape.layers} layers per token "
        f"attended to; decoded tokens {attended}",
        f"memory = {_billions(shape.weights)} weights x {work.itemsize} B + cache of one sequence, {cached / 1024:.0f} KiB per "
        f"token x {lengths.prompt + work.max_new_tokens:.0f} tokens{f', over {group} devices' if group > 1 else ''}; at most "
        f"{work.memory_share:.0%} of a device may be used",
    ]
    if engine is not None and engines and fleet.device.tflops:
        rate = fleet.flops_per_second * engines * group / fleet.processes
        bandwidth = fleet.device.gigabytes * 1e9 * fleet.bandwidth_share * group
        reading = (
            arithmetic.decoding_seconds(responses * lengths.response, engines, engine, bandwidth) if bandwidth else 0.0
        )
        demand.seconds = prefill / rate + max(decode / rate, reading)
        demand.formulas.append(
            f"time = prefill {prefill:.2e} FLOPs / {rate:.2e} per s + the longer of decoding {decode:.2e} FLOPs and of reading "
            f"{engine.bytes_per_step / GIB:.1f} GiB per step of {engine.sequences} sequences in each of {engines} engines at "
            f"{bandwidth / 1e9:,.0f} GB/s"
        )
    return demand


def convert_demand(stage: str, rows: int, pairs: int, lengths: Lengths, scorer: str | None) -> Demand:
    """Return what pairing needs."""
    disk = arithmetic.row_bytes(pairs, lengths)
    demand = Demand(
        stage, "convert_data.py", responses=rows, pairs=pairs, disk=disk, seconds=rows / GATHERED_PER_SECOND
    )
    demand.formulas += [
        disk_formula(pairs, "pairs", lengths),
        f"time = {rows:,} rows / {GATHERED_PER_SECOND:,} per s on one core (benchmarks/results/generate-scale-cpu.json)",
    ]
    if scorer:
        demand.remarks.append(f"the time of the scorer {scorer} is not counted")
    return demand


def disk_formula(rows: int, what: str, lengths: Lengths) -> str:
    """Return the formula of :func:`arithmetic.row_bytes` with its numbers."""
    return (
        f"disk = {rows:,} {what} x ((2 x {lengths.prompt:.0f} + {lengths.ground_truth:.0f} + {lengths.response:.0f}) tokens x "
        f"{lengths.text_bytes:.1f} B of text + {lengths.response:.0f} ids x 4 B), before compression"
    )


@dataclass(frozen=True)
class Trained:
    """What a training does: ``rows`` of the data, each with ``responses``, in ``passes`` over them."""

    rows: int
    passes: float
    responses: int
    lengths: Lengths
    values: Mapping[str, Any]
    needs_reference: bool

    @property
    def row_tokens(self) -> float:
        """Tokens of a row: its prompt once (or before each response, unless prompts are shared), and its responses."""
        prompts = 1 if self.responses == 1 or self.values.get("share_prompts", True) else self.responses
        return prompts * self.lengths.prompt + self.answer_tokens

    @property
    def answer_tokens(self) -> float:
        return self.lengths.ground_truth + (self.lengths.response if self.responses > 1 else 0)


def train_demand(
    stage: str, program: str, shape: ModelShape, work: Trained, layout: Parallelism, fleet: Fleet
) -> Demand:
    """Return what a training needs, the pass of the reference included."""
    from spin.alignment.pipeline.planning.memory import training_memory

    checkpointing = bool(work.values.get("gradient_checkpointing"))
    tokens, answers = work.rows * work.row_tokens, work.rows * work.answer_tokens
    attended = (work.lengths.prompt + work.answer_tokens / work.responses) / 2
    trained = arithmetic.training_flops(shape, tokens, answers, attended, checkpointing) * work.passes
    reference = arithmetic.forward_flops(shape, tokens, answers, attended) if work.needs_reference else 0.0
    memory = training_memory(shape, work.values, work.lengths, work.responses, layout, fleet)
    demand = Demand(
        stage,
        program,
        pairs=work.rows,
        tokens=tokens * work.passes,
        flops=trained + reference,
        memory=memory.device,
        host=memory.host,
        fits=memory.fits,
        processes=fleet.processes,
    )
    passes = (
        "4 (forward, backward, forward again for gradient checkpointing)" if checkpointing else "3 (forward, backward)"
    )
    demand.formulas += [
        f"tokens = {work.rows:,} rows x {work.row_tokens:.0f} x {work.passes:.3g} epochs",
        f"FLOPs = {passes} x (2 x {_billions(shape.layers * shape.layer_weights)} weights of layers per token + 4 x "
        f"{shape.query_width:,} x {shape.layers} layers x {attended:.0f} attended to) + 3 x 2 x {_billions(shape.table_weights)} "
        "weights of the head per response token" + (" + one forward pass for the reference" if reference else ""),
        f"memory, {layout.name}: {memory.detail}",
    ]
    if memory.budget:
        demand.formulas.append(f"micro-batches of {memory.budget:,} tokens")
    if fleet.flops_per_second:
        demand.seconds = demand.flops / fleet.flops_per_second if demand.flops else 0.0
        demand.formulas.append(
            f"time = {demand.flops:.2e} FLOPs / ({fleet.processes} x {fleet.device.tflops:g} TFLOP/s x {fleet.utilization:.0%})"
        )
    add_checkpoints(demand, shape, work, layout)
    return demand


def add_checkpoints(demand: Demand, shape: ModelShape, work: Trained, layout: Parallelism) -> None:
    """Add the bytes of the saved model, of the checkpoints to resume from, and of the reference store."""
    from spin.alignment.pipeline.doctor_machine import checkpoints_kept
    from spin.alignment.training.memory.estimate import state_bytes

    values = work.values
    size = 2 if "bfloat16" in (values.get("dtype"), values.get("save_dtype")) else 4
    model, kept, optim = size * shape.weights, checkpoints_kept(values), str(values.get("optim", "rmsprop"))
    # DeepSpeed saves float32 copies of the weights with the states. Adapters and their states are small.
    states = state_bytes(optim, shape.weights, 4 if layout.is_deepspeed else size)
    states += 4 * shape.weights if layout.is_deepspeed else 0
    resumed = 0 if values.get("use_peft") else model + states
    store = arithmetic.reference_bytes(work.rows, work.answer_tokens) if work.needs_reference else 0.0
    demand.disk = model + kept * resumed + store
    demand.formulas.append(
        f"disk = model {model / GIB:.1f} GiB ({size} B per weight) + {kept} checkpoints x {resumed / GIB:.1f} GiB (model and "
        f"states of {optim}) + reference store {store / GIB:.2f} GiB ({work.answer_tokens:.0f} log-probs x 4 B per pair)"
    )


def _billions(number: float) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e8 else f"{number / 1e6:.3g}M"
