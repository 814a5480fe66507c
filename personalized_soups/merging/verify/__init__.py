"""Verify a merged folder: merge again from its soup.json, and compare."""
