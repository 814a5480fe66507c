"""Verify a merged folder: repeat the merge that its soup.json records, and compare the results."""
