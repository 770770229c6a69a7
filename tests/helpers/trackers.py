"""What each tracker has stored of a run, read with its own reader."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spin.alignment.training.trackers import TRACKERS, missing_package
from spin.alignment.training.trackers.base import STEP_AXIS

INSTALLED = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(not importlib.util.find_spec(TRACKERS[name].module), reason=missing_package(name)),
    )
    for name in TRACKERS
]
Point = tuple[int, float]
# name of a run -> its points by metric, those of a table with NaN
Stored = dict[str, dict[str, list[Point]]]


def in_tensorboard(folder: Path) -> Stored:
    """Every point of every file of events, also those that TensorBoard itself would hide as repeated."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: Stored = {}
    for run in (folder / "tensorboard").iterdir():
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
        scalars = {tag: [(item.step, item.value) for item in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        tables = {tag: [(item.step, 0.0) for item in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
        found[run.name] = scalars | {tag.removesuffix("/text_summary"): points for tag, points in tables.items()}
    return found


def wandb_records(path: Path) -> Iterator[bytes]:
    """The serialized records of a .wandb file, which is a log of LevelDB after a header of 7 bytes.

    Blocks have 32 KiB; a fragment has 7 bytes of checksum, length and type: 1 whole, 2 first, 3 middle, 4 last.
    """
    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (rest := 32768 - place % 32768) < 7:
            place += rest
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def in_wandb(folder: Path) -> Stored:
    """The history of every offline run, by the last part of its name; several attempts of a run have one id."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: Stored = {}
    names: dict[str, str] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(path):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                group, _, name = record.run.display_name.rpartition("/")
                assert (record.run.run_group, names.setdefault(name, record.run.run_id)) == (group, record.run.run_id)
                found.setdefault(name, {})
            elif record.WhichOneof("record_type") == "history":
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                for key, value in values.items():
                    number = value if isinstance(value, int | float) else 0.0
                    found[name].setdefault(key, []).append((values.get(STEP_AXIS, -1), number))
    return found


def in_mlflow(folder: Path) -> Stored:
    """The metrics and tables of every run in the local database."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder.resolve() / 'mlflow.db'}")
    found: Stored = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            points = {
                ("train/" if "/" not in name else "") + name: [
                    (item.step, item.value) for item in client.get_metric_history(run.info.run_id, name)
                ]
                for name in run.data.metrics
            }
            tables = {item.path.removesuffix(".json"): [(0, 0.0)] for item in client.list_artifacts(run.info.run_id)}
            assert run.info.run_name.rpartition("/")[2] not in found
            found[run.info.run_name.rpartition("/")[2]] = points | tables
    return found


def in_trackio(folder: Path) -> Stored:
    """Everything in Trackio's database; ``folder`` is not used, because Trackio has one for all projects."""
    from trackio.sqlite_storage import SQLiteStorage

    found: Stored = {}
    for project in SQLiteStorage.get_projects():
        for run in SQLiteStorage.get_runs(project):
            for log in SQLiteStorage.get_logs(project, run):
                points = found.setdefault(run.rpartition("/")[2], {})
                for key, value in log.items():
                    number = value if isinstance(value, int | float) else 0.0
                    points.setdefault(key, []).append((log.get(STEP_AXIS, -1), number))
    return found


READERS: dict[str, Callable[[Path], Stored]] = {
    "tensorboard": in_tensorboard,
    "wandb": in_wandb,
    "mlflow": in_mlflow,
    "trackio": in_trackio,
}
