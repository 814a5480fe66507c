"""Classifiers of texts: a logistic regression on counts of words, or on a base model's hidden states."""
