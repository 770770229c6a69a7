"""From generated rows to preference pairs: gathering fractions, labelling, pairing and writing."""
