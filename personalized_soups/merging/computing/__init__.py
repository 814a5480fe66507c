"""Compute what a merge writes: tensors in, tensors out, no files."""
