"""What averages gradients, and where the filter meets it."""
