"""The transformers backend: a running batch that stays full."""
