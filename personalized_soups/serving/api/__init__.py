"""The routes of the server, a file for each thing that is asked for."""
