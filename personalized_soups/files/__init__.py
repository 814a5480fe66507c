"""Read and write safetensors files and sharded checkpoints, and write an output folder completely or not at all."""
