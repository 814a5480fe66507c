"""Merge the experts of a profile: plan the merge, compute the soup, and write it as an adapter or a model."""
