"""The library: prompts, generations, pairs, weights, batches, loss, checkpoint (data flows in that order)."""
