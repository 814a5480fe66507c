"""OpenAI's protocol: requests, responses, streams and errors; knows no web server."""
