"""Continuous batching: the queue, the running batch, the KV cache slots, sampling and detokenization. No HTTP."""
