"""Twenty thousand steps of everything at once: replicas stay equal, memory, threads and descriptors flat."""
