"""Whether a merged folder is what its soup.json says: made again, and compared."""
