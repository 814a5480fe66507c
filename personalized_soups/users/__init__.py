"""Everybody's profiles: kept with all their versions in SQLite or PostgreSQL."""
