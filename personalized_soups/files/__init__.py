"""Bytes to named tensors and back: safetensors files, checkpoints in shards, folders written all or nothing."""
