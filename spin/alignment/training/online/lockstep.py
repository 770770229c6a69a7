"""A sharded policy that samples: all processes run the same number of forward passes, whatever each has to decode."""

from __future__ import annotations

from typing import Any

import torch


class Lockstep:
    """Calls a sharded module, each of whose forward passes is a collective operation.

    Before each of its own, a process says that it runs one; a process with nothing left to decode runs a stand-in instead, until
    none decodes any more (:meth:`finish`).
    """

    def __init__(self, module: Any, device: torch.device) -> None:
        """``module`` is the policy as it was sharded; it takes ids, mask and positions like a causal language model."""
        self._module, self._device = module, device

    def __call__(self, **inputs: Any) -> Any:
        """Run a forward pass of this process's own."""
        self._announce(1)
        return self._module(**inputs)

    def finish(self) -> None:
        """Run stand-ins, of one token each, until no process has a forward pass of its own left. Every process must call it."""
        one = torch.ones(1, 1, dtype=torch.long, device=self._device)
        with torch.no_grad():
            while self._announce(0).item():
                self._module(input_ids=one, attention_mask=one, position_ids=one - 1, use_cache=False)

    def _announce(self, running: int) -> torch.Tensor:
        """Return how many processes run a forward pass of their own; read only by those that do not, as reading waits."""
        count = torch.tensor(running, device=self._device)
        torch.distributed.all_reduce(count)
        return count
