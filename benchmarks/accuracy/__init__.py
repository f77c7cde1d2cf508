"""When does agreement filtering help? Runs beside fair controls: `python -m benchmarks.accuracy --help`."""
