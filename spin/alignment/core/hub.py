"""Why something of the Hugging Face Hub could not be had, in a few words."""

from __future__ import annotations

from spin.alignment.core.errors import reason_of


def hub_reason(error: Exception) -> str:
    """Return why a name of the Hub could not be read, given the error that the library raised.

    Offline, the libraries speak of connections, addresses and snapshots: that nothing may be downloaded is all there is to know.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "it is not in the Hub cache, and HF_HUB_OFFLINE is set"
    return reason_of(error)
