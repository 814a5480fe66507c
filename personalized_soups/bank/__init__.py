"""The expert bank, which stacks the LoRA factors of the chosen experts."""
