"""Score answers, compare models, and write the results as tables, reports and pictures."""
