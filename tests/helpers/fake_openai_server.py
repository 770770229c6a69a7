"""A small OpenAI-compatible server for tests: it answers at once, always the same, and misbehaves on request."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


def answer_to(body: dict[str, Any]) -> dict[str, Any]:
    """What a server says: ids made from prompt and seed, ended by a stop id in about half of the cases."""
    seen = hashlib.sha256(json.dumps([body["prompt"], body["seed"]]).encode()).digest()
    ids = [10 + byte for byte in seen[: body["max_tokens"]]]
    choice = {"index": 0, "text": "...", "finish_reason": "length", "prompt_token_ids": body["prompt"]}
    if seen[-1] % 2:
        ids = [*ids[:4], body["stop_token_ids"][0]]
        choice |= {"finish_reason": "stop", "stop_reason": ids[-1]}
    if "logprobs" in body:
        choice["logprobs"] = {"token_logprobs": [-token / 100 for token in ids]}
    return {"choices": [choice | {"token_ids": ids}]}


class FakeServer:
    """A server on a free port of this machine. ``behave(handler, body)`` may answer in its own way and then returns True."""

    def __init__(self, port: int = 0) -> None:
        self.models: Any = {"data": [{"id": "tiny", "max_model_len": 64}]}
        self.behave: Callable[[Handler, dict[str, Any]], bool] = lambda handler, body: False
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.targets: list[str] = []
        self.http = Listener(("127.0.0.1", port), Handler)
        self.http.fake = self
        self.port = self.http.server_address[1]
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def prompts(self) -> list[list[int]]:
        return [body["prompt"] for body in self.bodies]

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.http.cut_connections()
        self.thread.join()


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    fake: FakeServer

    def __init__(self, *arguments: Any) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        for connection in list(self.open):
            self.shutdown_request(connection)

    def handle_error(self, *arguments: Any) -> None:
        """A client that goes away is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Listener

    def do_GET(self) -> None:
        self.server.fake.targets.append(self.path)
        self.server.fake.headers.append(self.headers)
        found = urlsplit(self.path).path == "/v1/models"
        self.say(200 if found else 404, self.server.fake.models if found else {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake = self.server.fake
        fake.bodies.append(body)
        fake.headers.append(self.headers)
        assert urlsplit(self.path).path in ("/v1/completions", "/v1/chat/completions", "/classify")
        if not fake.behave(self, body):
            self.say(200, answer_to(body))

    def say(self, status: int, answer: Any, **headers: str) -> bool:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
        return True

    def hang_up(self) -> bool:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        return True

    def log_message(self, *arguments: Any) -> None:
        """Say nothing on stderr."""
