"""Real people: learn a basis from some people's ratings of statements, and predict other people's from a few answers.

The data are the ratings that the PAlign project published as PAPI: people rated 300 statements from 1 to 5.
"""
