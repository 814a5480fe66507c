"""Scores of answers, comparisons of models, and their tables, reports and pictures."""
