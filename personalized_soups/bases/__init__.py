"""Base models by name and from GGUF files: where the value of `base` becomes a model folder."""
