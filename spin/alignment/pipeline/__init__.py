"""spin run: configuration, stages, the record of a run, and the commands that inspect it."""
