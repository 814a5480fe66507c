"""PAL (arXiv:2406.08469): rewards by closeness to a user's ideal point, which is a mixture of shared prototypes."""
