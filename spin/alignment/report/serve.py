"""``spin serve``: the page of a run over HTTP on this machine only, made again whenever the run has new results. Read-only."""

from __future__ import annotations

import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_text
from spin.alignment.pipeline.status import running_stages
from spin.alignment.report.collected import collect
from spin.alignment.report.page import Page, render_page, run_page, waiting_page
from spin.alignment.report.reported_run import ReportedRun, open_reported_run
from spin.alignment.report.summary import NoResults
from spin.alignment.training.live_step import read_live_step

LOOPBACK = "127.0.0.1"
# A page elsewhere could reach this server under a name of its own that resolves to the loopback address.
_LOCAL_NAMES = (LOOPBACK, "localhost")


class LivePage:
    """The page of a run directory, made again when the files that it shows have changed. Safe to use from several threads."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._mutex = threading.Lock()
        self._made = ("", "")  # version, page

    def version(self) -> str:
        """Return a text that changes with the results and the states of the stages."""
        return _version(open_reported_run(self.run_dir))

    def live(self) -> str:
        """Return what is running now as JSON: a list of lines, such as ``iter0/train: step 120 of 500, ...``."""
        run = open_reported_run(self.run_dir)
        return json.dumps(
            [
                f"{name}: {line}"
                for name, progress in _running(run).items()
                for line in (progress or "running").split("\n")
            ]
        )

    def page(self) -> str:
        """Return the page as HTML; before the first results, one that says so."""
        with self._mutex:
            run = open_reported_run(self.run_dir)
            version = _version(run)
            if version != self._made[0]:
                self._made = (version, _render(run, version))
            return self._made[1]


def _running(run: ReportedRun) -> dict[str, str]:
    if run.manifest is not None:
        return running_stages(run.folder)
    found = {model.name: read_live_step(model.folder / "checkpoint") for model in run.models}
    return {f"{name}/train": live.describe_with_time() for name, live in found.items() if live and not live.has_ended}


def _version(run: ReportedRun) -> str:
    files = [run.folder / "manifest.json"]
    for model in run.models:
        files += [model.folder / name for name in ("eval.json", "metrics.json", "checkpoint/metrics.json")]
    facts = [f"{file} {file.stat().st_mtime_ns}" for file in files if file.exists()]
    return hash_text(*facts)


def _render(run: ReportedRun, version: str) -> str:
    try:
        page: Page = run_page(collect(run))
    except NoResults:
        page = waiting_page(run)
    page.live = True
    page.data["version"] = version
    return render_page(page)


def make_server(run_dir: str | Path, port: int) -> ThreadingHTTPServer:
    """Return a server of the page of a run on the loopback address; port 0 takes any free one.

    Raises:
        InputError: the folder contains no run, or the port is taken.
    """
    live = LivePage(Path(run_dir))
    live.version()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").rpartition(":")[0] not in _LOCAL_NAMES:
                self.send_error(HTTPStatus.FORBIDDEN, "use the address that `spin serve` printed")
                return
            answers = {
                "/": (live.page, "text/html"),
                "/version": (live.version, "text/plain"),
                "/live": (live.live, "application/json"),
            }
            if self.path not in answers:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            make, kind = answers[self.path]
            try:
                content = make().encode()
            except InputError as error:
                self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(error))
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """A request of the reader's own browser is no news."""

    try:
        return ThreadingHTTPServer((LOOPBACK, port), Handler)
    except OSError as error:
        raise InputError(f"cannot listen on port {port} ({error.strerror}): give another with --port") from error


def serve(run_dir: str | Path, port: int) -> None:
    """Serve the page of a run until interrupted; raises as :func:`make_server`."""
    with make_server(run_dir, port) as server:
        say(f"http://{LOOPBACK}:{server.server_port}/  (Ctrl-C ends it)")
        server.serve_forever()
