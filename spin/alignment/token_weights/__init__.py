"""Token weights: scored under frozen models, aligned, weighted, written."""
