"""Names of the responses of a preference row, in the order of every stream and table."""

SIDES = ("chosen", "rejected")
# The response of the model that the first iteration started from: a third one, for the losses that read it.
INITIAL = "initial"
