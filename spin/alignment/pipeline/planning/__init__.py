"""What a run will need, computed from its configuration before anything is started (`spin plan`)."""
