"""The wrapped layers of a model: stacked factors, gates, and one product for layers that share an input."""
