"""Self-play fine-tuning of language models: generate, convert, train, repeat."""

__version__ = "0.1.0"
