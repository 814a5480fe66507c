"""Search a user's weights without gradients: CMA-ES on a measure of the user's own data (PriME, arXiv:2503.18008).

A generation of candidates is one mixed batch, in which each row has the weights of its candidate.
"""
