"""Run tasks in threads and processes on one machine."""
