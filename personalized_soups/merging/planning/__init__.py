"""Plan a merge from headers alone: no tensor is read."""
