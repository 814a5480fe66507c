"""PReF (arXiv:2503.06358): base rewards learned from many users' comparisons, and a weight per user and base reward."""
