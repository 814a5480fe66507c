"""What decides which of two answers suits a side better."""
