"""Everything that the page of a run shows, read from the folders of its models once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spin.alignment.evaluation.responses import HeldOutResponses, responses_path
from spin.alignment.pipeline.stages.base import Model
from spin.alignment.report.curves import response_lengths
from spin.alignment.report.reported_run import ReportedRun
from spin.alignment.report.summary import Results, metrics_of, summarize
from spin.alignment.report.weights_page import Token, shown_pairs

WEIGHTED_PAIRS = 4  # of each iteration
WeightedPairs = Sequence[tuple[str, dict[str, list[Token]]]]


@dataclass(frozen=True)
class Collected:
    """A run with its results; ``metrics`` (metrics.json), ``lengths`` (tokens of every held-out response) and ``weights`` (a few
    pairs with token weights) are by name of the model. ``price_per_hour`` is that of the machine, in any currency.
    """

    run: ReportedRun
    results: Results
    metrics: dict[str, dict[str, Any]]
    lengths: dict[str, dict[str, dict[str, int]]]
    weights: dict[str, WeightedPairs]
    price_per_hour: float | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json."""
        return self.results.summary

    @property
    def responses(self) -> dict[str, HeldOutResponses]:
        """The stored held-out responses by name of the model."""
        return self.results.responses


def collect(run: ReportedRun, price_per_hour: float | None = None) -> Collected:
    """Read the results of a run.

    Raises:
        InputError: it has none yet, or one of its files is damaged.
    """
    results = summarize(run)
    metrics = {model.name: found for model in run.models if (found := metrics_of(model))}
    folders = {model.name: model.folder for model in run.models if model.name in results.responses}
    lengths = {name: response_lengths(responses_path(folder / "eval.json")) for name, folder in folders.items()}
    weights = {model.name: pairs for model in run.models if (pairs := _weighted_pairs(model))}
    return Collected(run, results, metrics, lengths, weights, price_per_hour)


def _weighted_pairs(model: Model) -> WeightedPairs:
    """Return the first pairs with token weights that a model was trained on; none for a method without weights."""
    folder, checkpoint = model.folder / "weights", model.folder / "checkpoint"
    if model.role != "policy" or not any(folder.glob("*_prefs*.parquet")) or not (checkpoint / "config.json").is_file():
        return []
    from spin.alignment.data.chat_encoder import load_encoder

    return shown_pairs(folder, load_encoder(str(checkpoint)), WEIGHTED_PAIRS)
