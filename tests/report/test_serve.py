"""`spin serve`: the page over HTTP on the loopback address, new when the run has new results; nothing else is served."""

from __future__ import annotations

import http.client
import json
import shutil
import threading

import pytest

from spin import cli
from spin.alignment.pipeline.lock import run_lock
from spin.alignment.pipeline.manifest import RunManifest, StageRecord
from spin.alignment.report.serve import make_server
from spin.alignment.training.live_step import LiveStep, write_live_step
from tests.helpers import run_main
from tests.helpers.evaluations import write_finished_run


@pytest.fixture
def served(tmp_path):
    """A run directory and a function that requests a path of its server."""
    run_dir = write_finished_run(tmp_path)
    server = make_server(run_dir, port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def get(path: str, method: str = "GET", host: str = "") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        connection.request(method, path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    yield run_dir, get
    server.shutdown()
    server.server_close()


def test_the_page_follows_the_run(served):
    run_dir, get = served
    files = sorted(run_dir.rglob("*"))
    kept = run_dir / "iter1"
    away = kept.rename(run_dir.parent / "iter1")
    code, version = get("/version")
    status, page = get("/")
    assert code == status == 200 and "iter0 is the best" in page and f'"version":"{version}"' in page
    assert "connect-src 'self'" in page and "location.reload" in page
    away.rename(kept)
    assert get("/version")[1] != version and "iter1 is the best" in get("/")[1]
    assert sorted(run_dir.rglob("*")) == files  # read-only


def test_a_run_without_results_is_waited_for(served):
    run_dir, get = served
    for folder in ("sft", "control", "iter0", "iter1"):
        shutil.rmtree(run_dir / folder)
    status, page = get("/")
    assert status == 200 and "no results yet" in page and "settings: train" in page
    (run_dir / "run.yaml").write_text("a: [")
    status, page = get("/")
    assert status == 503 and "run.yaml" in page


def test_the_live_step_of_a_running_training(served):
    run_dir, get = served
    assert get("/live") == (200, "[]")
    manifest = RunManifest(run_dir)
    manifest.stages["iter1/train"] = StageRecord("running", {}, "")
    manifest.save()
    (run_dir / "iter1" / "checkpoint").mkdir(exist_ok=True)
    write_live_step(run_dir / "iter1" / "checkpoint", LiveStep(3, 9, loss=0.5, seconds_left=65))
    assert get("/live") == (200, "[]")  # nobody works on the run
    with run_lock(run_dir):
        status, content = get("/live")
        assert status == 200 and json.loads(content) == ["iter1/train: step 3 of 9, loss 0.5, 1 min 05 s left"]
        code, out, _ = run_main(cli.main, "status", run_dir)
        assert code == 0 and "step 3 of 9, loss 0.5, 1 min 05 s left" in out and "interrupted" not in out
    assert "interrupted" in run_main(cli.main, "status", run_dir)[1]
    code, out, _ = run_main(cli.main, "status", run_dir / "iter1" / "checkpoint")
    assert code == 0 and "running, step 3 of 9" in out  # of a training without a run
    assert '<p class="quiet" id="live" role="status">' in get("/")[1]


def test_nothing_else_is_served(served):
    _, get = served
    assert get("/manifest.json")[0] == get("/../run.yaml")[0] == 404
    assert get("/", method="POST")[0] == 501
    # A page elsewhere that resolves its own name to this machine is refused.
    assert get("/", host="evil.example:80")[0] == 403


def test_what_cannot_be_served_is_named(served, tmp_path):
    run_dir, _ = served
    code, _, err = run_main(cli.main, "serve", tmp_path)
    assert code == 2 and "contains no run" in err
    server = make_server(run_dir, port=0)
    code, _, err = run_main(cli.main, "serve", run_dir, f"--port={server.server_port}")
    server.server_close()
    assert code == 2 and "give another with --port" in err
