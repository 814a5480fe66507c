"""Merging: a profile and a library to a soup, planned first, then written as an adapter or folded into a base."""
