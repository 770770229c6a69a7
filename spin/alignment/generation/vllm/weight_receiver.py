"""Replacing the weights of a running vLLM engine, one at a time: how they are sent, and what its workers do with them.

A *push* is one complete set of weights, divided into numbered pieces. A piece may be sent twice, as after a lost answer, and a
worker that was started anew in the middle of a push says so. The weights are the model's own, or those of a LoRA adapter, which
are written to a folder for vLLM to load.

A worker whose model does not take a weight says so from then on, because it may have weights of two sets. It does not raise, as a
server reports an exception like a passing failure, after which the piece is sent again.
"""

from __future__ import annotations

import base64
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import reason_of

if TYPE_CHECKING:
    from torch import Tensor

PIECE_BYTES = 2**26
TAKEN, LOST, REFUSED = "taken", "lost", "refused: "  # what a worker answers; a refusal goes on with the reason


class WeightsRefused(RuntimeError):
    """The model of vLLM does not take some weight, and cannot be used any more; the message says which weight and why."""


def send_weights(
    call: Callable[[str, Sequence[Any]], Iterable[str]],
    weights: Iterable[tuple[str, Tensor]],
    as_text: bool = False,
    adapter: dict[str, Any] | None = None,
) -> bool:
    """Send all weights; return whether every worker has taken them. If not, the rest is still drawn from ``weights``.

    Args:
        call: calls a method of :class:`WeightReceiver` in all workers and returns what they answer.
        as_text: send the content as base64, for JSON.
        adapter: entries of the ``adapter_config.json`` of the LoRA adapter that the weights are of; None: of the model.

    Raises:
        WeightsRefused: the model does not take one of them.
    """
    push, number = uuid.uuid4().hex, 0

    def taken(method: str, *arguments: Any) -> bool:
        answers = list(call(method, (push, *arguments)))
        for answer in answers:
            if answer.startswith(REFUSED):
                raise WeightsRefused(answer.removeprefix(REFUSED))
        return all(answer == TAKEN for answer in answers)

    sent = taken("begin_policy_weights", *(() if adapter is None else (adapter,)))
    for name, weight in weights:
        if not sent:
            continue
        dtype, content = str(weight.dtype).removeprefix("torch."), content_of(weight)
        for start in range(0, len(content), PIECE_BYTES):
            piece = bytes(content[start : start + PIECE_BYTES])
            text = base64.b64encode(piece).decode() if as_text else piece
            sent = sent and taken("take_policy_piece", number, name, dtype, list(weight.shape), text)
            number += 1
    return sent and taken("end_policy_weights", number)


def content_of(weight: Tensor) -> memoryview:
    """Return the bytes of a weight."""
    import torch

    return weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass
class _Push:
    """The last push of a worker: the adapter it is of, if any, the number of its next piece, what has come of a weight, the whole
    weights of an adapter, whether it is complete, and why it was refused, if it was."""

    name: str
    adapter: dict[str, Any] | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)
    next_piece: int = 0
    content: bytearray = field(default_factory=bytearray)
    complete: bool = False
    refusal: str = ""

    def answer(self) -> str:
        return f"{REFUSED}{self.refusal}" if self.refusal else TAKEN


class WeightReceiver:
    """Methods that vLLM adds to its worker (``worker_extension_cls``), called in every worker of an engine.

    vLLM transforms a layer for its kernels once all of its weights have arrived, and copies it to where the old one was.
    """

    vllm_config: Any
    model_runner: Any

    def policy_adapter_rank(self) -> str:
        """Return the highest rank of the adapters that vLLM loads while it runs; 0: none; -1: only those it was started with."""
        from vllm import envs

        lora = self.vllm_config.lora_config
        if lora is None:
            return "0"
        return str(lora.max_lora_rank) if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING else "-1"

    def begin_policy_weights(self, push: str, adapter: dict[str, Any] | None = None) -> str:
        """Prepare the model for a push; an earlier one that was not completed is dropped, unless it was refused."""
        last = self._last_policy_push()
        if last is not None and last.refusal:
            return last.answer()
        if last is not None and not last.complete and last.adapter is None:
            self._put_to_use()
        if adapter is None:
            self._prepare()
        self._policy_push = _Push(push, adapter)
        return TAKEN

    def take_policy_piece(
        self, push: str, number: int, name: str, dtype: str, shape: list[int], content: bytes | str
    ) -> str:
        """Take the next piece of a weight, named as in a model folder; load the weight once it is whole."""
        import torch

        current = self._last_policy_push()
        if current is None or current.name != push or number > current.next_piece:
            return LOST
        if current.refusal or number < current.next_piece:  # its answer was lost
            return current.answer()
        current.content += content if isinstance(content, bytes) else base64.b64decode(content)
        current.next_piece += 1
        kind = getattr(torch, dtype)
        if len(current.content) == kind.itemsize * torch.Size(shape).numel():
            weight = torch.frombuffer(current.content, dtype=kind).view(shape)
            current.content = bytearray()  # another, because vLLM keeps the weight until its layer is complete
            if current.adapter is not None:
                current.weights[name] = weight
                return TAKEN
            current.refusal = self._load_policy_weight(name, weight)
        return current.answer()

    def _load_policy_weight(self, name: str, weight: Tensor) -> str:
        """Load a weight; return why the model does not take it, "" if it does."""
        try:
            loaded = self._within_vllm(self.model_runner.get_model().load_weights, [(name, weight)])
        except Exception as error:  # of whatever kind the model's own code raises
            return f"{name}: {_first_sentence(error)}"
        return f"{name}: the model has no such weight" if loaded is not None and not loaded else ""

    def end_policy_weights(self, push: str, count: int) -> str:
        """Put the weights of a push of ``count`` pieces to use."""
        current = self._last_policy_push()
        if current is None or current.name != push or current.next_piece != count:
            return LOST
        if not (current.complete or current.refusal) and current.adapter is None:  # otherwise its answer was lost
            try:
                self._put_to_use()
            except Exception as error:  # weights that only together are seen not to fit
                current.refusal = _first_sentence(error)
        current.complete = not current.refusal
        return current.answer()

    def write_policy_adapter(self) -> str:
        """Write the adapter of the last push to a new folder on this machine; return its path, or that the push was lost."""
        from spin.alignment.models.adapters import write_adapter

        current = self._last_policy_push()
        if current is None or not current.complete or current.adapter is None:
            return LOST
        folder = Path(tempfile.mkdtemp(prefix="spin-adapter-"))
        write_adapter(folder, current.adapter, current.weights.items())
        current.folders.append(folder)
        return str(folder)

    def remove_policy_adapter(self) -> str:
        """Remove the folders of the last push, once vLLM has loaded them, and its weights."""
        current = self._last_policy_push()
        if current is not None:
            for folder in current.folders:
                shutil.rmtree(folder, ignore_errors=True)
            current.weights.clear()
        return TAKEN

    def _last_policy_push(self) -> _Push | None:
        return getattr(self, "_policy_push", None)

    def _prepare(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._within_vllm(initialize_layerwise_reload, self.model_runner.get_model())

    def _put_to_use(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        self._within_vllm(finalize_layerwise_reload, self.model_runner.get_model(), self.vllm_config.model_config)

    def _within_vllm(self, function: Callable[..., Any], *arguments: Any) -> Any:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            return function(*arguments)


def _first_sentence(error: Exception) -> str:
    return reason_of(error).partition(". ")[0]  # vLLM goes on with the names of all weights
