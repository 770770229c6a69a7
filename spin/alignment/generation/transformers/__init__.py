"""The transformers backend: continuous batching on top of transformers models."""
