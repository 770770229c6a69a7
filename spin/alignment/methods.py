"""A method is a triple of pairing, token weighting and loss: one registry each, pure functions."""
