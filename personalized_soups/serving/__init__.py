"""The server: continuous batching with a soup for each request, OpenAI's API over HTTP, and the playground page.

A soup is the weighted sum of the experts.
"""
