"""The memory of a training step: measured, estimated, planned."""
