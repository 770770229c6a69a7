"""Training: preference, SFT and online."""
