"""Judges, which decide which of two answers to a prompt follows a criterion better."""
