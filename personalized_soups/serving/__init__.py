"""Serving: continuous batching with a soup for each request, OpenAI's API over HTTP, and a playground page."""
