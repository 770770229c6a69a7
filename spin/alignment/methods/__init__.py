"""A method is a combination of pairing, token weighting and loss: pure functions with one registry each."""
