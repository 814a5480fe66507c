"""The data that the package stores for each user: versions of the user's profile."""
