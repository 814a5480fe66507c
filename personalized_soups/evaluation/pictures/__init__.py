"""Draw the results of an evaluation as PNG files that are shown 900 pixels wide."""
