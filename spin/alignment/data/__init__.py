"""Rows: reading data in other formats, the project's own row format, and encoding conversations to token ids."""
