"""Triton kernels for NVIDIA GPUs. On other devices, torch operations compute the same results."""
