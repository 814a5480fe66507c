"""The pictures of an evaluation, as PNG files to be shown 900 pixels wide."""
