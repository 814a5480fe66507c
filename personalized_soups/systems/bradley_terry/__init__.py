"""The baseline: one reward for all users, by the model of Bradley and Terry (1952)."""
