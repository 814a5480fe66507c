"""The profile store: every version of each user's profile, in SQLite or PostgreSQL."""
