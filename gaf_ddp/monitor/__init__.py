"""What was decided, for people: sums, history, warnings, logs, reports and pictures."""
