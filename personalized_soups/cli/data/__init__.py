"""Commands that make training data, and judge answers."""
