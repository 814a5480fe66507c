"""The HTTP server: the application and its routes, the checks before a request, and the connections."""
