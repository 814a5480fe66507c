"""Commands that learn who users are."""
