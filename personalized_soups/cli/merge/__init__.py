"""Commands that merge experts and check merges."""
