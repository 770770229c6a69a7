"""The backend of an OpenAI-compatible server that is already running."""
