"""The data, tokenizers and model configurations of the demos, made by code: the same rows at every run."""
