"""The options of ``spin plan``, without heavy imports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spin.alignment.core.flags import from_arguments
from spin.alignment.core.settings import check_settings, setting, settings_of


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is made for."""

    gpu: str | None = setting(
        None, "name of the GPU, such as H100 or A100", group="devices", unset="that of this machine"
    )
    gpus: int | None = setting(
        None, "GPUs of a machine", unset="launch.num_processes of the configuration, divided by launch.nodes", ge=1
    )
    nodes: int | None = setting(None, "machines", unset="launch.nodes of the configuration", ge=1)
    gpu_memory: float | None = setting(
        None, "memory of a GPU in GiB", unset="that of the named GPU, or this machine's", gt=0
    )
    peak_tflops: float | None = setting(
        None, "peak of dense bfloat16 matrix products in TFLOP/s", unset="that of the named GPU", gt=0
    )
    utilization: float = setting(0.4, "fraction of that peak that is reached", gt=0, le=1)
    rates: str | None = setting(None, "an earlier run whose measured rates are used instead of the peak", path="input")
    prompts: int | None = setting(
        None, "prompts of every split to train on", group="workload", unset="counted in the data", ge=1
    )
    test_prompts: int | None = setting(None, "held-out prompts", unset="counted in the data, else 500", ge=1)
    prompt_tokens: float | None = setting(None, "mean tokens of a prompt", unset="of the data's first rows", gt=0)
    response_tokens: float | None = setting(
        None, "mean tokens of ground truth and response", unset="of the data's first rows", gt=0
    )
    model_config: str | None = setting(
        None, "config.json of the model, if the model is not on this machine", unset="that of the model", path="input"
    )
    explain: bool = setting(False, "show the formula of every number")

    def __post_init__(self) -> None:
        check_settings(self)


def split_arguments(arguments: Sequence[str]) -> tuple[PlanOptions, list[str]]:
    """Return the options of ``spin plan``, and the arguments that are overrides of the configuration.

    Raises:
        InputError: a value of the wrong type or out of range.
    """
    own, overrides, names = [], [], settings_of(PlanOptions)
    takes_next = False
    for item in arguments:
        name = item.removeprefix("--").partition("=")[0]
        if takes_next or (item.startswith("--") and name in names):
            own.append(item)
            takes_next = not takes_next and "=" not in item and name != "explain"
        else:
            overrides.append(item)
    return from_arguments(PlanOptions, own, "spin plan"), overrides
