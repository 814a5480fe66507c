"""Live soups: a soup inside a loaded model, changed in place."""
