"""Which gradients count: pure functions of matrices of inner products."""
