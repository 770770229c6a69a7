"""What each stage of a run took: time, tokens per second, and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spin.alignment.core.lock import is_locked
from spin.alignment.core.text import duration
from spin.alignment.data.response_tokens import response_tokens
from spin.alignment.report.reported_run import ReportedRun

HEADINGS = ("stage", "state", "time", "share", "tokens", "tokens/s", "peak memory")
CLUSTER_HEADINGS = ("process hours", "restarts")
CAPTION = (
    "time: wall-clock time over all attempts; tokens: of the responses that were generated, or of the rows trained on; tokens/s: "
    "over the whole stage, start-up included; peak memory: of the first process (GPU memory where there is one); of a run on a "
    "cluster, process hours: of its tasks, each GPU counted, while they had machines; restarts: tasks that were started again"
)


@dataclass(frozen=True)
class StageCost:
    """One stage: ``seconds`` of wall-clock time over all attempts, response ``tokens``, ``memory`` in GiB (None: not known).

    ``devices`` is what its tasks took on a cluster, in seconds times GPUs (times processes without GPUs), with ``restarts``;
    None: it ran on one machine.
    """

    name: str
    state: str
    seconds: float
    tokens: int | None = None
    memory: float | None = None
    devices: float | None = None
    restarts: int = 0

    def cells(
        self, total: float, price_per_hour: float | None = None, on_cluster: bool = False
    ) -> list[tuple[str, float | None]]:
        """Return (text, value to sort by) for each heading but the first two; ``total`` is the time of all stages.

        Of a run ``on_cluster``, the price is that of a GPU, or of a process without GPUs.
        """
        speed = self.tokens / self.seconds if self.tokens and self.seconds else None
        hours = (self.devices or 0.0) / 3600 if on_cluster else self.seconds / 3600
        cost = None if price_per_hour is None else price_per_hour * hours
        tasks = [(f"{hours:.2f}", hours), (str(self.restarts), float(self.restarts))] if on_cluster else []
        return [
            (duration(self.seconds) if self.seconds or self.state != "running" else "–", self.seconds),
            (f"{self.seconds / total:.0%}" if total else "–", self.seconds),
            (f"{self.tokens:,}" if self.tokens is not None else "–", self.tokens),
            (f"{speed:,.0f}" if speed is not None else "–", speed),
            (f"{self.memory:.1f} GiB" if self.memory is not None else "–", self.memory),
            *tasks,
            *([(f"{cost:.2f}", cost)] if cost is not None else []),
        ]


def stage_costs(run: ReportedRun, metrics: dict[str, dict[str, Any]]) -> list[StageCost]:
    """Return every recorded stage of a run; of a run of the shell scripts, the trainings.

    ``metrics`` has the content of metrics.json by name of the model.
    """
    if run.manifest is None:
        return [
            StageCost(f"{name}/train", "done", found["seconds"], _trained_tokens(found), _memory(found))
            for name, found in metrics.items()
            if "seconds" in found
        ]
    by_folder = {model.folder.name: metrics[model.name] for model in run.models if model.name in metrics}
    costs = []
    for name, record in run.manifest.stages.items():
        folder, _, kind = name.rpartition("/")
        trained = by_folder.get(folder, {}) if kind == "train" else {}
        tokens = _trained_tokens(trained)
        if kind in ("generate", "evaluate"):
            files = [run.folder / file for file in record.outputs if file.endswith(".parquet")]
            tokens = sum(map(response_tokens, files)) if files else None
        # The record of an interrupted stage is that of a running one.
        state = "interrupted" if record.state == "running" and not is_locked(run.folder) else record.state
        devices, restarts = record.usage.get("device_seconds"), int(record.usage.get("restarts", 0))
        costs.append(StageCost(name, state, record.seconds, tokens, _memory(trained), devices, restarts))
    return costs


def _trained_tokens(metrics: dict[str, Any]) -> int | None:
    return metrics.get("accounting", {}).get("trained", {}).get("tokens")


def _memory(metrics: dict[str, Any]) -> float | None:
    peak = metrics.get("peak_memory", {})
    return peak.get("gpu", peak.get("host"))
