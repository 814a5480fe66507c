"""The interview of `psoups profile infer`: questions and keys at a terminal, and what is printed at the end."""
