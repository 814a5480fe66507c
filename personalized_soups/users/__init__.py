"""What the system knows about each user: stored profiles."""
