"""Triton kernels for NVIDIA GPUs. Elsewhere, torch operations compute the same numbers."""
