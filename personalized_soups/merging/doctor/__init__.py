"""Check experts against each other and against their base before merging them."""
