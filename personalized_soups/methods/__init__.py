"""Merge methods: pure functions that merge the deltas of several experts into one delta. `table` lists the methods."""
