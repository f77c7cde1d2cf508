"""Whether all ranks compute, hold and add up the same."""
