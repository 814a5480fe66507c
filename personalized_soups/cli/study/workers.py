"""The number of worker processes of a study."""

from __future__ import annotations

import os

# The quickstart trains six experts at once.
_MOST_WORKERS = 6


def num_workers(workers: int) -> int:
    """Return `workers` if it is positive. If it is 0, return the number of available cores, but at most 6."""
    return workers or min(_MOST_WORKERS, len(os.sched_getaffinity(0)))
