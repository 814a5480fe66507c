"""Plan a merge: decide from headers, without computing a tensor."""
