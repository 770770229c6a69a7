"""Models: folders of saved models, loading, precision, adapters and saving."""
