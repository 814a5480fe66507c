"""The expert bank: the factors of all chosen experts, stacked once."""
