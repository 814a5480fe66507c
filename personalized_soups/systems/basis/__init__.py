"""A learned basis: base rewards of answers that many users' comparisons gave, with the folder that holds them."""
