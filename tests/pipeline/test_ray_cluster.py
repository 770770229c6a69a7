"""Programs as tasks of Ray, on several raylets of this machine, some of which are killed."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.project_version import project_version
from spin.alignment.core.provenance import hash_file
from spin.alignment.pipeline import clusters
from spin.alignment.pipeline.clusters import ClusterSettings, RayCluster, team
from spin.alignment.pipeline.clusters.ray_cluster import RayHandle, look_at_machine
from spin.alignment.pipeline.clusters.remote import NODE_MODULE
from spin.alignment.pipeline.run_sections import LaunchConfig
from spin.alignment.pipeline.stalls import process_state
from tests.helpers import REPOSITORY, program_environment, save_tiny_model
from tests.helpers.cluster_stages import Running, script_stage
from tests.helpers.runs import TRAINING, tiny_run, write_config, write_sums

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'selfplay-spin[ray]'"
)
NODE = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20}


def wait_for(condition: Callable[[], Any], seconds: float = 300.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


# Every process says that it has started, and waits until it is told that one was lost.
WAITS = """
assert os.environ["HF_TOKEN"] == "hf_secret"
(folder / f"first-{os.getpid()}").touch()
while not (folder / "lost").exists():
    time.sleep(0.05)
print("finished the work")
"""


class LocalRay:
    """A head and two more raylets with a core each. ``kill_worker_node`` ends one that runs a task, and adds another."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args=NODE)
        self.others = [self.cluster.add_node(**NODE) for _ in range(2)]

    def _runs_task(self, node: Any) -> bool:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return any(NODE_MODULE in process.cmdline() for process in raylet.children(recursive=True))

    def kill_worker_node(self) -> None:
        node = wait_for(lambda: next((node for node in self.others if self._runs_task(node)), None))
        self.others.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)  # SIGKILL
        self.others.append(self.cluster.add_node(**NODE))
        self.cluster.wait_for_nodes()  # until Ray has noticed: whoever connects before would be told of a dead node


@pytest.fixture(scope="module")
def local_ray():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv(
            "RAY_worker_niceness", "0"
        )  # of 15 by default: on a busy machine its tasks would hardly get a core
        ray = LocalRay()
        yield ray
        ray.cluster.shutdown()


@pytest.fixture
def cluster(tmp_path, local_ray, monkeypatch):
    """A cluster with two workers that is connected to from this process."""
    monkeypatch.setattr(team, "LOOK_SECONDS", 0.1)
    monkeypatch.setenv("RAY_ADDRESS", local_ray.cluster.address)
    launch = LaunchConfig(cluster="ray", num_processes=2, gpus=False, retries=1)
    found = RayCluster(ClusterSettings(tmp_path / "run", launch, secrets={"HF_TOKEN": "hf_secret"}))
    found.open()
    yield found
    found.close()


@needs_ray
def test_a_worker_whose_node_is_killed_is_started_on_another(tmp_path, cluster, local_ray, capfd):
    running = Running(cluster, script_stage(tmp_path, WAITS, cluster.settings.launch))
    wait_for(lambda: len(list((tmp_path / "run" / "a").glob("first-*"))) == 2)
    local_ray.kill_worker_node()
    wait_for(lambda: len(list((tmp_path / "run" / "a").glob("first-*"))) == 3)
    (tmp_path / "run" / "a" / "lost").touch()
    assert running.result() == 0 and cluster.take_usage("a/b").restarts == 1
    said = capfd.readouterr().out
    assert "starting it again (1 of 1)" in said and "finished the work" in said and "hf_secret" not in said


@needs_ray
def test_stop_cancels_the_tasks(tmp_path, cluster):
    code = '(folder / f"pid-{os.getpid()}").touch(); time.sleep(60)'
    running = Running(cluster, script_stage(tmp_path, code, cluster.settings.launch))
    started = wait_for(lambda: found if len(found := list((tmp_path / "run" / "a").glob("pid-*"))) == 2 else None)
    cluster.stop()
    assert running.result() == 130
    assert all(process_state(int(path.name.partition("-")[2])) in ("", "Z") for path in started)


def weights_of(run_dir: Path) -> str:
    return hash_file(run_dir / "iter0" / "checkpoint" / "model.safetensors")


@needs_ray
@pytest.mark.slow
def test_a_run_whose_nodes_are_killed_ends_equal_to_an_undisturbed_one(tmp_path, local_ray):
    """A node is lost while it generates and one while it trains; the undisturbed run is one of this machine."""
    save_tiny_model(tmp_path / "model")
    write_sums(tmp_path / "data", num_train=1600)
    values = tiny_run(
        tmp_path,
        iterations=1,
        overrides=None,
        data={"train": str(tmp_path / "data")},
        generate={"max_new_tokens": 24, "frac_len": 400, "flush_every": 4, "batch_size": 1},
        train={**TRAINING, "max_steps": 60, "save_steps": 10},
        evaluate=None,
        launch={"num_processes": 2},
    )
    disturbed = {**values, "run_dir": str(tmp_path / "ray")}
    disturbed["launch"] = {"num_processes": 2, "cluster": "ray", "nodes": 2, "gpus": False}
    run = start(write_config(tmp_path / "ray.yaml", disturbed), tmp_path / "ray.out", local_ray.cluster.address)

    def kill_a_node_once(is_time: Callable[[], bool]) -> None:
        wait_for(lambda: run.poll() is not None or is_time())
        assert run.poll() is None, (tmp_path / "ray.out").read_text()
        local_ray.kill_worker_node()

    try:
        generated = tmp_path / "ray" / "iter0" / "generated"
        kill_a_node_once(lambda: any(generated.rglob("*.parquet")))
        assert len(list(generated.glob("*.parquet"))) < 4, "it had generated everything"
        kill_a_node_once((tmp_path / "ray" / "iter0" / "checkpoint" / "checkpoint-10").is_dir)
        assert run.wait(300) == 0, (tmp_path / "ray.out").read_text()
    finally:
        run.terminate()
        run.wait(60)
    quiet = start(write_config(tmp_path / "config.yaml", values), tmp_path / "quiet.out")
    assert quiet.wait(300) == 0, (tmp_path / "quiet.out").read_text()
    assert weights_of(tmp_path / "ray") == weights_of(tmp_path / "run")
    stages = json.loads((tmp_path / "ray" / "manifest.json").read_text())["stages"]
    assert stages["iter0/train"]["usage"]["restarts"] == 1 and stages["iter0/train"]["usage"]["device_seconds"] > 0
    said = (tmp_path / "ray.out").read_text()
    assert re.search(r"iter0/generate\.\d was lost .*: starting it again", said)
    # The process on the other machine may fail for want of its peer before Ray notices that the node is gone.
    assert re.search(r"iter0/train\.0 (was lost|failed with exit code \d+).*: starting it again", said)
    assert "resuming from" in said
    assert "process hours" in (tmp_path / "ray" / "report.md").read_text()


def start(config: Path, output: Path, address: str | None = None) -> subprocess.Popen[bytes]:
    environment = program_environment(**({"RAY_ADDRESS": address} if address else {}))
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "spin", "run", str(config)],
            cwd=REPOSITORY,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


@needs_ray
def test_without_a_cluster_the_sentence_says_how_to_start_one(tmp_path, monkeypatch):
    import ray

    def refuse(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(InputError, match=r"no Ray cluster can be reached.*ray start --head.*RAY_ADDRESS"):
        RayCluster(ClusterSettings(tmp_path / "run", LaunchConfig(cluster="ray"))).open()


def test_without_the_package_the_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Ray is not installed: pip install 'selfplay-spin\[ray\]'"):
        clusters.CLUSTERS["ray"].check(LaunchConfig(cluster="ray"))


def test_a_machine_that_does_not_share_the_folder_says_so(tmp_path):
    (tmp_path / "token").write_text("abc")
    version, environment = project_version(), program_environment()

    def look(folder: Path | str, token: str, cwd: Path | str, version: str = version) -> str:
        return look_at_machine("7", str(folder), token, str(cwd), version, environment)

    assert look(tmp_path, "abc", tmp_path) == ""
    assert (tmp_path / "token-7").read_text() == "abc"
    assert look(tmp_path, "abc", "/no/such").startswith("has no folder /no/such: run_dir")
    assert look(tmp_path, "other", tmp_path).startswith(f"sees another folder as {tmp_path}: ")
    assert "cannot use /no/such (No such file or directory): " in look("/no/such", "abc", "/")
    assert look(tmp_path, "abc", tmp_path, "0.0.1") == (
        f"has selfplay-spin {version}, but `spin run` is 0.0.1: install the same version on every machine"
    )
    environment["PYTHONPATH"] = (
        "/no/such"  # as if the project, or the version of it that can say this, was not installed
    )
    environment["PYTHONSAFEPATH"] = environment["PYTHONNOUSERSITE"] = "1"
    environment["PYTHONHOME"] = "/no/such"
    assert "cannot start this program (" in look(tmp_path, "abc", tmp_path)


@needs_ray
def test_a_node_with_another_version_is_named(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr("spin.alignment.pipeline.clusters.ray_cluster.project_version", lambda: "0.0.1 (code 1a2b3c4d)")
    with pytest.raises(
        InputError, match=r"the Ray node .* \(.*\) has selfplay-spin .*, but `spin run` is 0\.0\.1 \(code"
    ):
        cluster._check_nodes()


@needs_ray
def test_the_other_machines_of_a_group_that_failed_are_interrupted_once(tmp_path, cluster, monkeypatch):
    """A second interrupt would let a task go, and its GPUs, while its program is still ending."""
    import ray

    def fails() -> int:
        return 1

    def ends_slowly(folder: str) -> int:
        try:
            (Path(folder) / "started").touch()
            while True:
                time.sleep(0.05)
        finally:
            time.sleep(1.5)
            (Path(folder) / "ended").touch()

    monkeypatch.setattr("spin.alignment.pipeline.clusters.ray_cluster._GROUP_SECONDS", 0.0)
    slow = ray.remote(ends_slowly).options(max_retries=0).remote(str(tmp_path))
    wait_for((tmp_path / "started").exists)
    handle = RayHandle([ray.remote(fails).options(max_retries=0).remote(), slow], None)
    ending = wait_for(lambda: handle.poll(), 30)
    assert not ending.is_success and (tmp_path / "ended").exists()
