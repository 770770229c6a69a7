"""MLflow: the runs of an experiment, on the server of ``MLFLOW_TRACKING_URI`` or in a local database."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from spin.alignment.training.trackers.base import TrackedRun, Tracker

_KEY_TAG = "spin.key"


class MLflow(Tracker):
    # The package mlflow excludes the pyarrow that this project needs; mlflow-skinny writes the same, also to a local database.
    packages = ("mlflow-skinny", "sqlalchemy", "alembic")
    module = "mlflow"

    def variables(self, run: TrackedRun) -> dict[str, str]:
        uri = os.environ.get("MLFLOW_TRACKING_URI", _local_uri(run))
        return {
            "MLFLOW_TRACKING_URI": uri,
            "MLFLOW_EXPERIMENT_NAME": _experiment_name(run),
            "MLFLOW_RUN_ID": _run_id(run, uri),
        }

    def close(self, failed: bool) -> None:
        mlflow = sys.modules.get("mlflow")
        if mlflow is not None and mlflow.active_run() is not None:
            mlflow.end_run(status="FAILED" if failed else "FINISHED")

    def open(self, run: TrackedRun) -> Any:
        import mlflow
        from accelerate.tracking import MLflowTracker

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        uri = os.environ.get("MLFLOW_TRACKING_URI", _local_uri(run))
        mlflow.set_tracking_uri(uri)
        tracker = MLflowTracker(_experiment_name(run), run_id=_run_id(run, uri), run_name=run.name)
        tracker.start()
        return tracker

    def table(self, opened: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        import mlflow

        data = {column: [row[place] for row in rows] for place, column in enumerate(columns)}
        mlflow.log_table({**data, "step": [step] * len(rows)}, f"{name}.json")  # adds to the rows of earlier calls


def _experiment_name(run: TrackedRun) -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME", run.shared_name)


def _local_uri(run: TrackedRun) -> str:
    return f"sqlite:///{run.folder.resolve() / 'mlflow.db'}"


def _run_id(run: TrackedRun, uri: str) -> str:
    """Return the id that MLflow gave a run, found by its key; the run, and its experiment, are created at the first call."""
    from mlflow import MlflowClient

    run.folder.mkdir(parents=True, exist_ok=True)
    client, name = MlflowClient(tracking_uri=uri), _experiment_name(run)
    experiment = client.get_experiment_by_name(name)
    artifacts = str(run.folder.resolve() / "mlflow") if uri == _local_uri(run) else None
    number = experiment.experiment_id if experiment is not None else client.create_experiment(name, artifacts)
    found = client.search_runs([number], f"tags.`{_KEY_TAG}` = '{run.key}'", max_results=1)
    made = found[0] if found else client.create_run(number, run_name=run.name, tags={_KEY_TAG: run.key})
    return str(made.info.run_id)
