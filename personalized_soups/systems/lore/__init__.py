"""LoRe (arXiv:2504.14439): base rewards learned from many users, each of whom has a convex combination of them."""
