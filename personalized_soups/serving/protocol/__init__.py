"""OpenAI's protocol: requests, responses, streams and errors. These modules do not depend on the web server."""
