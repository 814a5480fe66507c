"""Mix on the fly: one base model answers each row of a batch with its own soup, and no weights are merged.

A soup is the weighted sum of the experts' deltas. A mixture is the list of soups of one batch.
"""
