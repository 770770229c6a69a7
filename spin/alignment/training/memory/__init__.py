"""Memory of a training step: measuring, estimating and planning it."""
