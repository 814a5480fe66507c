"""The command-line interface. Each folder holds one group of commands, and only render.py prints."""
