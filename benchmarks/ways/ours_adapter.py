"""This project, from Python: experts to one adapter folder."""

from __future__ import annotations

import json
import sys
import time

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile
from personalized_soups.merging.planning.options import MergeOptions
from personalized_soups.merging.writing.adapter import merge


def main(experts: str, weights: dict[str, float], out: str, rank: int | None = None) -> None:
    """Print the seconds from the opening of the experts to the finished folder."""
    start = time.perf_counter()
    merge(ExpertLibrary.open(experts), Profile(weights=weights), MergeOptions(rank=rank)).write(out)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
