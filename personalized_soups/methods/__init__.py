"""Merge methods: pure functions that compute a soup's delta from the experts' deltas, and the table that lists them."""
