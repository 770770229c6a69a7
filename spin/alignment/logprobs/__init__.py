"""Token log-probs of preference pairs under a model: batches, attention, forward passes, the stored reference."""
