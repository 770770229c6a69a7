"""Models scored on held-out prompts."""
