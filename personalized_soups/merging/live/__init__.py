"""Live soups. A live soup is the weighted sum of experts inside a loaded model, and its weights can change in place."""
