"""SFT for the initial model and the continued-SFT control, with the data, prompts, truncation and packed rows of SPIN.

    accelerate launch spin/run_sft.py CONFIG.yaml [--key=value ...]

Only response tokens are learned. ``init_from_config: true`` starts from random weights. The output is as in run_spin.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.core.key_tables import usage
from spin.alignment.core.program import is_help, run_program
from spin.alignment.data.config import DataConfig
from spin.alignment.models.config import ModelConfig
from spin.alignment.training.keys import OutputConfig, SFTKeys

USAGE = usage(
    "accelerate launch spin/run_sft.py",
    "Fine-tunes on the ground truth. CONFIG.yaml and --key=value accept these keys:",
    (ModelConfig, DataConfig, SFTKeys, OutputConfig),
    "and the keys of trl.SFTConfig. See docs/configuration.md and docs/training.md#sft.",
)


def main(arguments: Sequence[str]) -> None:
    if is_help(arguments, USAGE):
        return
    from spin.alignment.core.config import load_config
    from spin.alignment.training.settings import check_declared

    values = load_config(arguments[0], arguments[1:])
    check_declared(values, arguments[0], SFTKeys)
    from spin.alignment.training.run import train
    from spin.alignment.training.sft import SFTTraining

    train(SFTTraining(), values, arguments[0])


if __name__ == "__main__":
    run_program(main)
