"""The reference's log-probs of the pairs of a step, computed before any update of the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spin.alignment.logprobs.reference import check_finite

if TYPE_CHECKING:
    from accelerate import Accelerator

    from spin.alignment.logprobs.pair_forward import PairForward


def attach_reference_logps(forward: PairForward, features: Sequence[dict[str, Any]], accelerator: Accelerator) -> None:
    """Add ``{response}_reference``, the token log-probs (nats) under the model of ``forward``, to this process's pairs.

    Every process must call it: each runs the same number of forward passes, as FSDP and ZeRO-3 require, though they have
    different numbers of pairs. The model is without DDP's wrapper, which would wait for a backward pass.

    Raises:
        NotFiniteError: a log-prob is not finite.
    """
    names = forward.batcher.collator.responses
    stand_in = {"prompt_ids": [0]} | {f"{name}_ids": [0] for name in names}
    batches = forward.batcher.micro_batches(list(features) or [stand_in], accelerator, counted=bool(features))
    for batch in batches:
        # The first responses of the micro-batch, then its second ones; (R,) each.
        logps = [response.numpy() for response in forward.batch_logps(batch)]
        if not batch.counted:
            continue
        check_finite(logps, batch.features)
        for place, feature in enumerate(batch.features):
            assert isinstance(feature, dict)  # one of ``features`` itself
            for number, name in enumerate(names):
                feature[f"{name}_reference"] = logps[number * len(batch.features) + place]
