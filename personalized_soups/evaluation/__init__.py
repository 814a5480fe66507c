"""Measures of answers and comparisons of models, and how they are told: tables, reports, pictures."""
