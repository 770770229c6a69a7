"""Do these methods improve a real model? The studies of docs/evidence.md: their plan, the runner, and the tables of results."""
