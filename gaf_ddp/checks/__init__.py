"""Checks that all ranks compute and hold the same."""
