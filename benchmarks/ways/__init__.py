"""The ways of doing the work, each a script that is run in a fresh process and prints one JSON line."""
