"""The wrapped layers of a model: stacked LoRA factors, gates, and groups of layers that share one matrix product."""
