"""The way that waits: gradients travel, are judged in the same step, and their average comes back."""
