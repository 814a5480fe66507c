"""Merge methods: pure functions that merge the deltas of several experts into the delta of a soup, and their table."""
