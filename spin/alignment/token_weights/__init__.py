"""Token weights: scoring tokens under frozen models, aligning tokenizers, computing weights and writing them."""
