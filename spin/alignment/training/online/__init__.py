"""Online training: each step draws responses from the current policy, labels and pairs them, and updates the policy."""
