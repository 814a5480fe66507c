"""Commands that run studies and build the embedded base."""
