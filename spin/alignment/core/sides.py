"""Names of the responses of a preference row, in the order of every stream and table."""

SIDES = ("chosen", "rejected")
# A third response, for the losses that read it: that of the model that the first iteration started from.
INITIAL = "initial"
