"""The fake server with the development endpoints of vLLM by which its weights are replaced; it can restart at any moment."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import torch

from tests.helpers.fake_openai_server import FakeServer, Handler

FRESH = "default"  # the version of a server that was just started


class FakePolicyServer(FakeServer):
    """``before(path)`` is called before every request, and may call :meth:`restart`.

    ``rank`` is the highest of the adapters that it takes (0: none). They are served as models besides its own, "tiny".
    Requests to load or unload one whose paths are in ``lost_answers`` are fulfilled, but not answered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, torch.Tensor] = {}
        self.rank, self.adapters_loaded = 0, 0
        self.lost_answers: set[str] = set()
        self.behave = self._refuse_unknown
        self.before: Callable[[str], None] = lambda path: None
        self.complete, self.paused = False, False
        self.restart()
        self.http.RequestHandlerClass = PolicyHandler

    def restart(self) -> None:
        self.version, self.push, self.paused = FRESH, "", False
        self.received: dict[str, bytes] = {}
        self.served, self.adapter = ["tiny"], None

    def _refuse_unknown(self, handler: Any, body: dict[str, Any]) -> bool:
        return body["model"] not in self.served and handler.say(404, {"error": {"message": "no such model"}})

    def policy_adapter_rank(self) -> str:
        return str(self.rank)

    def begin_policy_weights(self, push: str, adapter: dict[str, Any] | None = None) -> str:
        assert self.paused
        self.push, self.received, self.adapter = push, {}, adapter
        return "taken"

    def write_policy_adapter(self) -> str:
        return "lost" if self.adapter is None else f"/on/the/server/{self.push}"

    def remove_policy_adapter(self) -> str:
        return "taken"

    def take_policy_piece(self, push: str, number: int, name: str, dtype: str, shape: list[int], text: str) -> str:
        if push != self.push:
            return "lost"
        content = self.received.get(name, b"") + base64.b64decode(text)
        self.received[name] = content
        if len(content) == getattr(torch, dtype).itemsize * torch.Size(shape).numel():
            self.weights[name] = torch.frombuffer(bytearray(content), dtype=getattr(torch, dtype)).view(shape)
        return "taken"

    def end_policy_weights(self, push: str, count: int) -> str:
        return "taken" if push == self.push else "lost"


class PolicyHandler(Handler):
    def do_GET(self) -> None:
        fake: Any = self.server.fake
        fake.before(self.path)
        if self.path == "/weight_info":
            self.say(200, {"weight_version": fake.version})
        elif self.path == "/v1/models":
            self.say(200, {"data": [fake.models["data"][0] | {"id": name} for name in fake.served]})
        else:
            super().do_GET()

    def do_POST(self) -> None:
        fake: Any = self.server.fake
        fake.before(self.path)
        path = urlsplit(self.path).path
        if path == "/v1/load_lora_adapter":
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert fake.paused and body["lora_path"] == f"/on/the/server/{fake.push}"
            if body["lora_name"] in fake.served:
                self.say(
                    400, {"error": {"message": f"The lora adapter '{body['lora_name']}' has already been loaded."}}
                )
                return
            fake.served.append(body["lora_name"])
            fake.adapters_loaded += 1
            self.hang_up() if path in fake.lost_answers else self.say(200, b"Success: added")  # no JSON, as in vLLM
            return
        if path == "/v1/unload_lora_adapter":
            name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["lora_name"]
            if name not in fake.served:
                self.say(404, {"error": {"message": f"The lora adapter '{name}' cannot be found."}})
                return
            fake.served.remove(name)
            self.hang_up() if path in fake.lost_answers else self.say(200, b"Success: removed")
            return
        if path.startswith("/v1/"):
            assert not fake.paused
            super().do_POST()
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if path == "/collective_rpc":
            self.say(200, {"results": [getattr(fake, body["method"])(*body["args"])]})
            return
        if path == "/update_weight_version":
            fake.version = body["new_version"]
        else:
            fake.paused = {"/pause": True, "/resume": False}[path]
        self.say(200, {})
