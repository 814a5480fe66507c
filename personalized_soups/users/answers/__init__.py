"""Estimate a user's weights from answers to questions, and choose the questions. Needs numpy, but no torch.

The model is that of PReF (arXiv:2503.06358): a user prefers answer `a` to answer `b` with probability
`sigmoid(w . (phi(a) - phi(b)))`, where `phi` are base rewards and `w` are the user's reward weights.
"""
