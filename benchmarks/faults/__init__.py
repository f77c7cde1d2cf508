"""What happens to a job when something breaks: every fault by every way of averaging, on real processes."""
