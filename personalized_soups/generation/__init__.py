"""Answers from a base model, alone or with an adapter: batched and streamed."""
