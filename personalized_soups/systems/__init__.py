"""The published systems that learn about users, one folder each, behind the interface of `preference_models`."""
