"""One prepared run for a GPU that is lent for minutes: tests, kernels, launches, a graph, step times, accuracy."""
