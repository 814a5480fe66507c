"""Commands that merge experts and check what was merged."""
