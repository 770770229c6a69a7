"""The backend for an OpenAI-compatible server that is already running."""
