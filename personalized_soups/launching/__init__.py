"""Run tasks on this machine: threads and processes."""
