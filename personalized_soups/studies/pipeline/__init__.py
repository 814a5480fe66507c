"""A run of many steps in one folder: each step runs again only if something that it depends on has changed."""
