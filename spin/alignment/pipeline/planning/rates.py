"""Rates that an earlier run reached: FLOPs per second of each program, from its manifest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from spin.alignment.core.errors import InputError
from spin.alignment.pipeline.manifest import RunManifest
from spin.alignment.pipeline.planning.demands import Demand


def measured_rates(run_dir: str, demands: Iterable[Demand]) -> dict[str, float]:
    """Return, by program, the FLOPs per second and process that the finished stages of a run reached, the time to start included;
    of programs without a model, rows per second.

    ``demands`` is the plan of that run. Its FLOPs are planned like those that the rates are applied to, so that what a plan
    systematically misses, such as responses longer than the ground truth, cancels out.

    Raises:
        InputError: no stage of the run has finished.
    """
    manifest = RunManifest(run_dir)
    work: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    for demand in demands:
        record = manifest.stages.get(demand.stage)
        if record is None or record.state != "done" or record.seconds <= 0:
            continue
        work[demand.program] += (
            float(demand.responses or 0) if demand.flops is None else demand.flops / demand.processes
        )
        seconds[demand.program] += record.seconds
    if not seconds:
        raise InputError(f"{run_dir} has no finished stage to take rates from: give a run that has one")
    return {program: work[program] / seconds[program] for program in seconds if work[program]}


def apply_rates(demands: Iterable[Demand], rates: Mapping[str, float]) -> None:
    """Set the time of every stage whose program has a measured rate; that of the processes of a fleet adds up."""
    for demand in demands:
        rate = rates.get(demand.program)
        if not rate:
            continue
        if demand.flops is None:
            demand.seconds = (demand.responses or 0) / rate
            said = f"{demand.responses or 0:,} rows / {rate:,.0f} per s"
        else:
            demand.seconds = demand.flops / (rate * demand.processes)
            said = f"{demand.flops:.2e} FLOPs / ({demand.processes} x {rate / 1e12:.3g} TFLOP/s)"
        demand.formulas = [line for line in demand.formulas if not line.startswith("time =")]
        demand.formulas.append(f"time = {said}, measured (--rates)")
