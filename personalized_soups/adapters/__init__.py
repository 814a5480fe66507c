"""What a LoRA folder means: its configuration, its tensors' names, its provenance, and which experts fit together."""
