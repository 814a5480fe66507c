"""Soups folded into a base: where they stand in it, block by block, shard by shard."""
