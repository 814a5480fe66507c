"""This project: the product of users' weights and experts' tensors alone, from memory to memory.

E experts, U users, P values of one expert.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

from benchmarks.ways.presence import found, give_up

_PRODUCTS = 9


def main(experts: int, users: int, values: int, device: str = "cpu") -> None:
    """Print bytes per second of what must move: every expert read once, every soup written once."""
    if device == "cuda" and not torch.cuda.is_available():
        give_up("no GPU here")
    weighted_sums = found("personalized_soups.methods.product", "weighted_sums")  # what merge_many multiplies with
    tensors = [torch.randn(values, device=device) for _ in range(experts)]
    w_UE = torch.rand(users, experts, device=device)
    out_UP = torch.full((users, values), 1.0, device=device)  # filled, so that all pages are there
    seconds = []
    for _ in range(_PRODUCTS):
        start = time.perf_counter()
        weighted_sums(w_UE, tensors, out_UP)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    moved = (experts + users) * values * 4
    print(json.dumps({"bytes_per_second": moved / statistics.median(seconds)}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
