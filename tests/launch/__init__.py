"""Tests of launch/: its parts, whole jobs on several ranks, and the job files."""
