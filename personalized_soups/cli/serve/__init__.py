"""Commands that serve users and store their profiles."""
