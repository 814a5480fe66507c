"""The command line: parse, call, print. One file per group of commands; render.py is the only file that prints."""
