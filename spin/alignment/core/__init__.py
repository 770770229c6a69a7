"""What everything else stands on: errors, settings, files, provenance, exit codes. Knows nothing of language models."""
