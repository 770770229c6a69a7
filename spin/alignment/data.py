"""Rows: foreign forms read, our own format written, conversations encoded to token ids."""
