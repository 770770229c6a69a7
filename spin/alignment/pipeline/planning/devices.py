"""The devices that a plan is made for: peak rates and memory of known GPUs, and this machine."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from spin.alignment.core.errors import InputError, lookup
from spin.alignment.core.machine import GIB


@dataclass(frozen=True)
class Device:
    """A GPU, or one process's share of a CPU machine; 0 stands for a rate that is not known.

    Attributes:
        tflops: peak of dense matrix products in bfloat16, in 10**12 per second.
        gigabytes: peak memory bandwidth, in 10**9 bytes per second.
        memory: in GiB.
    """

    name: str
    tflops: float
    gigabytes: float
    memory: float
    kind: str = "cuda"


# The makers' data sheets: dense bfloat16 (without sparsity), memory bandwidth, memory. The first entry whose name occurs in that
# of nvidia-smi is taken.
GPUS: dict[str, Device] = {
    device.name: device
    for device in (
        Device("B200", 2250, 8000, 180),
        Device("H200", 989, 4800, 141),
        Device("H100 PCIe", 756, 2000, 80),
        Device("H100", 989, 3350, 80),
        Device("A100-PCIE-40GB", 312, 1555, 40),
        Device("A100-SXM4-40GB", 312, 1555, 40),
        Device("A100", 312, 2039, 80),
        Device("L40S", 362, 864, 45),
        Device("L4", 121, 300, 22.5),
        Device("A10", 125, 600, 22.5),
        Device("RTX 4090", 165, 1008, 24),
        Device("RTX 3090", 71, 936, 24),
        Device("MI300X", 1307, 5300, 192),
    )
}


@dataclass(frozen=True)
class Fleet:
    """What a plan is made for.

    Attributes:
        processes: all processes of a training, one per GPU.
        nodes: machines that they are spread over.
        gpus: GPUs of all machines; None: as many as the processes of each program take.
        utilization: fraction of the peak that matrix products reach; ``bandwidth_share`` likewise for reads of memory.
    """

    device: Device
    processes: int
    nodes: int = 1
    gpus: int | None = None
    utilization: float = 0.4
    bandwidth_share: float = 0.6

    @property
    def flops_per_second(self) -> float:
        """FLOPs per second of all processes; 0 if the peak is not known."""
        return self.device.tflops * 1e12 * self.utilization * self.processes

    def engines(self, tensor_parallel: int) -> int:
        """Return how many engines generate at the same time: one per process, as far as there are GPUs for them."""
        return self.processes if self.gpus is None else self.gpus // tensor_parallel


def find_gpu(name: str) -> Device:
    """Return the table's entry for a GPU.

    Raises:
        InputError: there is none.
    """
    return lookup(GPUS, name, "GPU")


def this_machine(processes: int) -> tuple[Device, int]:
    """Return the device of this machine, and the number of its GPUs (0: processes share its processor and memory)."""
    listed = _listed_gpus()
    if not listed:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        return Device("CPU", 0, 0, memory / processes, kind="cpu"), 0
    name, memory = listed[0]
    known = next((device for key, device in GPUS.items() if key.lower() in name.lower()), None)
    return Device(name, known.tflops if known else 0, known.gigabytes if known else 0, memory), len(listed)


def _listed_gpus() -> list[tuple[str, float]]:
    """Return name and memory (GiB) of every GPU that nvidia-smi lists."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
        return [(name, float(mib) / 1024) for name, mib in (line.split(", ") for line in said.splitlines() if line)]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def make_fleet(
    gpu: str | None,
    gpus: int | None,
    nodes: int,
    gpu_memory: float | None,
    peak_tflops: float | None,
    processes: int,
) -> Fleet:
    """Return the fleet of the options of ``spin plan``; what is not given is that of this machine.

    ``processes`` is what the configuration starts; without ``gpus`` or several ``nodes`` it counts.

    Raises:
        InputError: GPUs are asked for on a machine that has none, without a name or memory.
    """
    device, found = this_machine(processes)
    if gpu is not None:
        device = find_gpu(gpu)
    elif not found and gpu_memory is not None:
        device = Device("GPU", 0, 0, gpu_memory)
    elif not found and gpus is not None:
        raise InputError(
            f"--gpus is {gpus}, but this machine has no GPU to plan with: name one with --gpu or --gpu_memory"
        )
    count = (processes if gpus is None else gpus) * nodes
    values = vars(device) | {"memory": gpu_memory or device.memory, "tflops": peak_tflops or device.tflops}
    return Fleet(Device(**values), count, nodes, None if gpus is None else count)
