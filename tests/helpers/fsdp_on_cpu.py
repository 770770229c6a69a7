"""Runs a training program, that of TRAINING_PROGRAM, under FSDP2 on a CPU, where accelerate itself would fall back to DDP."""

import importlib
import os
import sys

import accelerate.state
from accelerate.utils import DistributedType

_original = accelerate.state.PartialState.__init__


def _as_if_on_gpus(self, *args, **settings):
    _original(self, *args, **settings)
    if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    accelerate.state.PartialState.__init__ = _as_if_on_gpus
    importlib.import_module(f"spin.{os.environ['TRAINING_PROGRAM']}").main(sys.argv[1:])
    assert accelerate.state.AcceleratorState().distributed_type == DistributedType.FSDP
