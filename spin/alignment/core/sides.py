"""The two responses of a preference pair, in the order of every stream and table."""

SIDES = ("chosen", "rejected")
