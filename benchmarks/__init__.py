"""Speed and memory measurements; every number in ``docs/`` about speed comes from a program here."""
