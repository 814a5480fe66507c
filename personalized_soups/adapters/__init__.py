"""LoRA adapter folders: their configuration, tensor names and records, and checks that experts fit together."""
