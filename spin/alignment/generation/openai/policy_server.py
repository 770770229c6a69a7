"""A vLLM server whose weights are replaced between batches of responses, through its development endpoints."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.server_link import RetryPolicy, ServerLink
from spin.alignment.generation.vllm.weight_receiver import LOST, WeightReceiver, send_weights

if TYPE_CHECKING:
    from torch import Tensor

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

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> str | None:
        """Replace all weights, one at a time, while the server answers nobody; return the new version.

        None if the server was restarted meanwhile and lost some; ``weights`` is drawn to its end all the same.

        Raises:
            InputError: the server does not answer, or its model does not take these weights.
        """
        self._ask("/pause?mode=wait&clear_cache=true", "a pause", {})
        version = uuid.uuid4().hex
        if not send_weights(self._call, weights, as_text=True):
            return None
        self._ask("/update_weight_version", "the new version of its weights", {"new_version": version})
        self._ask("/resume", "the end of a pause", {})
        return version

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
