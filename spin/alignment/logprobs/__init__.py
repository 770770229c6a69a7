"""Token log-probs of preference pairs under a model: batches, attention, forward passes, stored reference log-probs."""
