"""Commands that train experts."""
