"""What the libraries write to the terminal while a model is loaded and saved: progress bars, reports, warnings. Left out here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def name_accelerator() -> None:
    """Tell DeepSpeed that there is only a CPU, if so: accelerate imports it, and it would warn that it found nothing else."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Without the library's bars, which are half a page in a log file and have ended before anyone can read them."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Without the library's progress bars and load reports (what they say is said as one sentence by the caller), and without
    ZeRO-3, which would partition a model that has no weights."""
    from transformers.integrations import deepspeed
    from transformers.utils import logging

    zero = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with without_progress_bars():
            yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero
        logging.set_verbosity(level)
