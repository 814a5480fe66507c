"""Bone Soups (Xie et al., ACL 2025): backbones are trained on mixtures of rewards, and merged for any preference."""
