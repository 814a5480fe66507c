"""Compute the tensors of a soup (the weighted sum of the experts). The modules of this package write no files."""
