"""A vLLM server whose weights are replaced between batches of responses, through its development endpoints."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.server_link import Refused, RetryPolicy, ServerLink
from spin.alignment.generation.vllm.weight_receiver import LOST, WeightReceiver, WeightsRefused, send_weights

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER = "spin-policy-"  # how the names begin under which the server serves the policy if only its adapter is pushed
RECEIVER = f"{WeightReceiver.__module__}.{WeightReceiver.__qualname__}"


class PolicyServer:
    """Sends weights to a server, and asks which it has. Each complete set has a version, which a restarted server forgets."""

    def __init__(self, base_url: str, key: str = "", policy: RetryPolicy | None = None) -> None:
        """``base_url`` is the address of its OpenAI API. ``policy`` decides how long a server that restarts is waited for.

        Raises:
            InputError: the address is not valid.
        """
        self._link = ServerLink(base_url.strip().rstrip("/").removesuffix("/v1"), 1, key)
        self._policy = policy or RetryPolicy()

    def version(self) -> str:
        """Return the version of the weights that the server has now; waits for a server that restarts.

        Raises:
            InputError: it does not answer, or was started without what replacing weights needs.
        """
        try:
            answer = self._ask("/weight_info", "the version of its weights")
        except InputError as error:
            if "HTTP 404" not in str(error):
                raise
            raise InputError(
                f"the server at {self._link.url} cannot replace its weights: start it with VLLM_SERVER_DEV_MODE=1 and with "
                f"--worker-extension-cls {RECEIVER}"
            ) from error
        return str(answer.get("weight_version"))

    def adapter_rank(self) -> int:
        """Return the highest rank of the LoRA adapters that can be pushed; 0: none; -1: neither adapters nor weights."""
        return int(self._call("policy_adapter_rank", ())[0])

    def push(self, weights: Iterable[tuple[str, Tensor]], adapter: dict[str, Any] | None = None) -> str | None:
        """Replace all weights, one at a time, while the server answers nobody; return the new version.

        With an ``adapter`` (entries of its ``adapter_config.json``) the weights are those of a LoRA adapter; the server serves
        its model with it as :data:`ADAPTER` and the version, and without it as before.

        None if the server was restarted meanwhile and lost some; ``weights`` is drawn to its end all the same.

        Raises:
            InputError: the server does not answer, or its model does not take these weights.
        """
        self._ask("/pause?mode=wait&clear_cache=true", "a pause", {})
        version = uuid.uuid4().hex
        try:
            is_sent = send_weights(self._call, weights, as_text=True, adapter=adapter)
        except WeightsRefused as error:
            raise InputError(
                f"the server at {self._link.url} does not take the policy's weights ({error}): start it anew, with the model "
                "that is trained"
            ) from error
        if not is_sent:
            return None
        if adapter is not None and not self._load_adapter(version):
            return None
        self._ask("/update_weight_version", "the new version of its weights", {"new_version": version})
        self._ask("/resume", "the end of a pause", {})
        return version

    def _load_adapter(self, version: str) -> bool:
        """Let the server load the adapter that it has been sent, instead of others; return False if it was restarted since."""
        folder, *_ = self._call("write_policy_adapter", ())
        if folder == LOST:
            return False
        for name in self._served():
            if name.startswith(ADAPTER):
                self._change("/v1/unload_lora_adapter", {"lora_name": name}, is_served=False)
        # Not in place: vLLM would then read the folder again for every step of its engine.
        self._change("/v1/load_lora_adapter", {"lora_name": ADAPTER + version, "lora_path": folder}, is_served=True)
        self._call("remove_policy_adapter", ())
        return True

    def _served(self) -> list[str]:
        return [str(card["id"]) for card in self._ask("/v1/models", "the request for its models")["data"]]

    def _change(self, path: str, body: dict[str, Any], is_served: bool) -> None:
        """Load or remove an adapter, so that afterwards the server serves it or not; the answer is a text."""
        try:
            self._link.start(self._link.send(path, "another adapter", self._policy, body, as_text=True)).result()
        except Refused:
            if (body["lora_name"] in self._served()) is not is_served:  # otherwise it was done, and the answer lost
                raise

    def _call(self, method: str, arguments: Sequence[Any]) -> list[str]:
        answer = self._ask("/collective_rpc", f"the call {method}", {"method": method, "args": list(arguments)})
        results = answer.get("results")
        return [str(result) for result in results] if isinstance(results, list) and results else [LOST]

    def _ask(self, path: str, purpose: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self._link.start(self._link.send(path, purpose, self._policy, body)).result()
        if not isinstance(answer, dict):
            raise InputError(f"the server at {self._link.url} answered {purpose} with {json.dumps(answer)[:80]}")
        return answer

    def close(self) -> None:
        """Close the connection; the server keeps the weights it has."""
        self._link.close()
