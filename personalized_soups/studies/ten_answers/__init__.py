"""Study of a finished quickstart: what ten answers of a user are worth, against the user's true weights."""
