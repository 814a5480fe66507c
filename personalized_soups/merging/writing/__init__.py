"""Write merged adapters and models: all or nothing."""
