"""Measure on simulated users how well a few answers tell which soup a user wants.

The users are simulated with known preferences, so every figure can be compared with the truth. Questions are on
validation topics. All figures are on held-out topics, which neither the experts nor the questions are about.
"""
