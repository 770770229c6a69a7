"""Generated rows to preference pairs: gathered, labelled, paired, written."""
