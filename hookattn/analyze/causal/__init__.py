"""What attention is worth to a number that a model's output is summed up in: its gradients, and what edits do to it."""
