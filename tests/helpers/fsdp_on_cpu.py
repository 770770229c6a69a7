"""Runs spin/run_spin.py under FSDP2 on a CPU, where accelerate itself would fall back to plain data parallelism."""

import sys

import accelerate.state
from accelerate.utils import DistributedType

from spin import run_spin

_original = accelerate.state.PartialState.__init__


def _as_if_on_gpus(self, *args, **settings):
    _original(self, *args, **settings)
    if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    accelerate.state.PartialState.__init__ = _as_if_on_gpus
    run_spin.main(sys.argv[1:])
    assert accelerate.state.AcceleratorState().distributed_type == DistributedType.FSDP
