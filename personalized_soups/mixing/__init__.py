"""Mix on the fly: one base in memory, a soup of its own for each row of a batch, and nothing is merged."""
