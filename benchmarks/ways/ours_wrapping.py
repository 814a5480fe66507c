"""This project: six experts put into a base that is loaded, ready to be mixed."""

from __future__ import annotations

import json
import sys
import time

from benchmarks import decoding
from personalized_soups.mixing.model import SoupModel


def main(experts: str, base: str) -> None:
    """Print the seconds for it."""
    model = decoding.load(base, "cpu", "float32")
    start = time.perf_counter()
    SoupModel(model, experts)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
