"""Plan a merge from the headers of the files, before any tensor is computed."""
