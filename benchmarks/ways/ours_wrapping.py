"""This project: six experts put into a base that is loaded, ready to be mixed."""

from __future__ import annotations

import json
import sys
import time

from benchmarks import decoding
from benchmarks.ways.presence import found


def main(experts: str, base: str) -> None:
    """Print the seconds for it."""
    soup_model = found("personalized_soups.mixing.model", "SoupModel")
    model = decoding.load(base, "cpu", "float32")
    start = time.perf_counter()
    soup_model(model, experts)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
