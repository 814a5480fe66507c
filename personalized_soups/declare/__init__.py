"""The files that people write: profiles, catalogues of preferences, and recipes. This package does not import torch."""
