"""Scorers: functions that decide how well an answer suits a side."""
