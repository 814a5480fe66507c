"""Continuous batching: the queue, the running batch, the KV cache, sampling and detokenization. No HTTP.

Requests join the running batch and leave it between any two steps, while the other requests continue.
"""
