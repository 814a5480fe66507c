"""One base for many users at once: continuous batching, an API that speaks OpenAI's protocol, and a playground."""
