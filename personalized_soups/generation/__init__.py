"""Generate answers with a base model, alone or with an adapter, in batches or as a stream."""
