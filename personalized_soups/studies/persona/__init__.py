"""Study on labels that are not ours: experts that agree with the statements of a trait, or disagree with them.

The statements are those of github.com/anthropics/evals (persona/, CC-BY-4.0): each is answered Yes or No.
"""
