"""What `spin doctor` finds out about the machine: memory, devices and their driver, disk, and the Hub."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spin.alignment.core.errors import InputError, reason_of
from spin.alignment.core.machine import GIB, size_text, weights_text

if TYPE_CHECKING:
    from spin.alignment.pipeline.config import RunConfig

Verdict = Literal["ok", "absent", "broken"]
_HUB_SECONDS = 3.0


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``needed`` findings decide the exit code."""

    what: str
    verdict: Verdict
    detail: str
    needed: bool = False


def memory_finding() -> Finding:
    """The memory of the machine."""
    import psutil

    memory = psutil.virtual_memory()
    return Finding("memory", "ok", f"{memory.total / GIB:.0f} GiB, {memory.available / GIB:.0f} GiB available")


def driver_finding() -> Finding:
    """The driver of NVIDIA's GPUs, and whether torch is built for them."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout.split()
    except FileNotFoundError:
        return Finding("driver", "absent", "no NVIDIA driver (nvidia-smi is not on PATH)")
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("driver", "broken", f"nvidia-smi fails ({reason_of(error)}): reinstall or restart the driver")
    return (
        Finding("driver", "ok", f"NVIDIA {said[0]}, {len(said)} GPUs")
        if said
        else Finding("driver", "absent", "no GPU")
    )


def devices() -> str:
    """Return what torch is built for and the devices that it can use, one per line."""
    import torch

    from spin.alignment.models.precision import has_bfloat16_instructions

    fast = ", bfloat16 in hardware" if has_bfloat16_instructions() else ""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    lines = [f"torch is built for {built}", f"{torch.get_num_threads()} CPU threads{fast}"]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        bf16 = "" if torch.cuda.is_bf16_supported() else ", no bfloat16"
        lines.append(f"cuda:{index} {facts.name}, {facts.total_memory / 2**30:.0f} GiB{bf16}")
    if torch.backends.mps.is_available():
        lines.append("mps")
    return "\n".join(lines)


def hub_finding() -> Finding:
    """Whether the Hub answers, and to whom; asked with a short timeout, unless HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    if constants.HF_HUB_OFFLINE:
        return Finding("Hub", "ok", "offline (HF_HUB_OFFLINE is set): only what has been downloaded is found")
    address = constants.ENDPOINT
    try:
        answer = get_session().get(f"{address}/api/whoami-v2", headers=build_hf_headers(), timeout=_HUB_SECONDS)
    except Exception as error:  # of whichever HTTP library the client uses
        fix = "set HF_HUB_OFFLINE=1 to use what has been downloaded without waiting"
        return Finding("Hub", "absent", f"{address} does not answer ({reason_of(error)}): {fix}")
    if answer.status_code == 200:
        return Finding("Hub", "ok", f"{address} answers, logged in as {answer.json().get('name')}")
    if answer.status_code in (401, 403):
        return Finding("Hub", "ok", f"{address} answers, without a valid token: public models only (hf auth login)")
    return Finding("Hub", "absent", f"{address} answers with status {answer.status_code}")


def disk_finding() -> Finding:
    """The free disk of this folder."""
    free = shutil.disk_usage(".").free / GIB
    example = "a 7B model takes 26 GiB in float32, and a checkpoint to resume from as much again per optimiser state"
    return Finding("disk", "ok", f"{free:.0f} GiB free here ({example}; spin doctor CONFIG.yaml counts those of a run)")


def run_disk(config_path: str) -> str:
    """Return how the free disk compares with what the models and checkpoints of a run take. Imports torch.

    Raises:
        InputError: they do not fit, or the configuration or its model cannot be read.
    """
    from spin.alignment.pipeline.config import load_run_config

    config = load_run_config(config_path)
    run_dir = Path(config.run_dir).absolute()
    where = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    free = shutil.disk_usage(where).free
    need, said = run_bytes(config)
    detail = f"{free / GIB:.1f} GiB free in {where}; {said}"
    if need > free:
        raise InputError(f"{detail}: set save_total_limit: 1, or another run_dir")
    return detail


def run_bytes(config: RunConfig) -> tuple[float, str]:
    """Return the bytes that the models and checkpoints of a run will take, and how they are made up.

    A checkpoint to resume from contains the weights and the optimiser states; those of a training that is complete are kept.
    Responses and pairs are not counted.

    Raises:
        InputError: the model's weights are not on this machine, or cannot be read.
    """
    from spin.alignment.pipeline.program_settings import online_values, train_values
    from spin.alignment.training.memory.estimate import state_bytes

    values = train_values(config, 0) if config.online is None else online_values(config)
    weights = weights_of(config)
    size = 2 if values.get("dtype") == "bfloat16" or values.get("save_dtype") == "bfloat16" else 4
    trainings = (config.iterations if config.online is None else 1) + sum(
        section is not None for section in (config.sft, config.control)
    )
    model = size * weights
    # Adapters are small; the model that they are merged into is saved whole.
    checkpoint = (
        0 if values.get("use_peft") else model + state_bytes(str(values.get("optim", "rmsprop")), weights, size)
    )
    kept = checkpoints_kept(values)
    total = trainings * (model + kept * checkpoint)
    return total, (
        f"{trainings} trainings of {weights_text(weights)} need about {size_text(total)}: each a model of "
        f"{size_text(model)} and {kept} checkpoint{'s' * (kept != 1)} of {size_text(checkpoint)} with optimiser states"
    )


def weights_of(config: RunConfig) -> int:
    """Return the number of weights of the model that a run starts from, read from the headers of its files."""
    from spin.alignment.models.folder import model_folder
    from spin.alignment.models.weights_check import read_header

    folder = model_folder(config.model, config.model_revision)
    headers = [read_header(path) for path in sorted(folder.glob("*.safetensors"))]
    if not any(headers):
        raise InputError(
            f"{config.model} has no weights in safetensors here, so the disk that the run needs is not known"
        )
    return sum(tensor.numel() for header in headers for tensor in header.values())


def checkpoints_kept(values: Mapping[str, Any]) -> int:
    """Return how many checkpoints of a training stay on the disk."""
    strategy, limit = str(values.get("save_strategy", "epoch")), values.get("save_total_limit")
    if strategy == "no":
        return 0
    epochs, steps = math.ceil(float(values.get("num_train_epochs", 3))), int(values.get("max_steps", -1))
    every = float(values.get("save_steps", 500))
    if strategy == "steps" and 0 < every < 1:
        made = math.ceil(1 / every)
    elif strategy == "steps" and steps > 0:
        made = max(1, math.ceil(steps / every))
    else:  # without the number of rows, steps are not known: at least one per epoch
        made = 1 if steps > 0 else epochs
    return made if limit is None else min(made, int(limit))
