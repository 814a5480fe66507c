"""Pipelines over everything below: the quickstart, and its repetition over seeds."""
