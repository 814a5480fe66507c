"""Merge methods: what a soup's delta should be. Pure functions on tensors, and one table that names them."""
