"""Models: their folder, loading, precision, adapters, saving."""
