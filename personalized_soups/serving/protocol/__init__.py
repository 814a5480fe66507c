"""OpenAI's protocol: requests, responses, streams and errors. These modules do not depend on `serving.web`."""
