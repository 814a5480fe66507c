"""What experts disagree in, and what will surprise, before anything is merged."""
