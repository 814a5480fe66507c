"""OpenAI's protocol: what clients ask, how it is answered, and how errors are told."""
