"""Write merged adapters and merged models. An output folder appears only when it is complete."""
