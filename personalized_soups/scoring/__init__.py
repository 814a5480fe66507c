"""Scorers: functions that rate where an answer lies between the two ends of a dimension."""
