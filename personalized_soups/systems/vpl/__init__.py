"""VPL (arXiv:2408.10075), variational preference learning: a user's comparisons are encoded as a hidden vector."""
