"""Mixing on the fly: one base in memory, another soup in every row of a batch; nothing is merged."""
