"""The vLLM backend: an engine in its own process."""
