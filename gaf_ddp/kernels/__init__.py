"""Passes over whole gradients: the plain function, and its Triton twin beside it."""
