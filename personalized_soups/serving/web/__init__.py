"""The HTTP server: the application, its routes, the request guard, connections."""
