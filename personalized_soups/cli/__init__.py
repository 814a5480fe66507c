"""The command line: parse, call, print. One folder per group of commands; only render.py prints."""
