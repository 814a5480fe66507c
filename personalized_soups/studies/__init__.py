"""Run whole studies: the quickstart, its repetition over seeds, and sweeps between two experts."""
