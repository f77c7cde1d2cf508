"""Trainers to start with torchrun: `launch/train.py` and one job file for each place it runs."""
