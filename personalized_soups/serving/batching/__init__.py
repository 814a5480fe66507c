"""Continuous batching: rows in slots, how each chooses its tokens, and the thread that lets them join and leave."""
