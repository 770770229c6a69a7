"""The line kept in memory: prompts, responses of the current policy, labels, pairs and updates, step by step."""
