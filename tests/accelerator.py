"""The way buckets take on accelerators, on a machine without one: all of it but streams and Triton's kernels."""

from gaf_ddp.runtime import device as devices


def take_accelerators_way() -> None:
    """Let this process's CPU pass for an accelerator: a rank's, which ends with its test."""
    devices._HOST = "no device"
