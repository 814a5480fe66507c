"""This project: the product of users' weights and experts' tensors alone.

The experts come from memory. On a CPU they are taken module by module, and the sums of a block stay in a buffer of the
thread's own, out of which merge_many writes them to the users' files: they are no second time in memory. On a GPU one
product takes all of them, as its launches would otherwise be what is measured.

E experts, U users.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

from benchmarks.ways.missing import give_up
from personalized_soups.launching.threads import in_order, num_workers
from personalized_soups.methods.product import BlockSums, weighted_sums

_PRODUCTS = 9
_MODULE = 8192 * 16  # B of a layer with 8192 outputs, at rank 16


def main(experts: int, users: int, values: int, device: str = "cpu") -> None:
    """Print bytes per second of what must move: every expert read once, every soup written once."""
    if device == "cuda" and not torch.cuda.is_available():
        give_up("no GPU here")
    sums = BlockSums()  # what merge_many multiplies with
    size = values if device == "cuda" else _MODULE
    modules = [
        [torch.randn(min(size, values - start), device=device) for _ in range(experts)]
        for start in range(0, values, size)
    ]
    w_UE = torch.rand(users, experts, dtype=torch.float64)

    def computed(tensors: list[torch.Tensor]) -> None:
        if device == "cuda":
            weighted_sums(w_UE, tensors)
            return
        for _block in sums.blocks(w_UE, tensors):
            pass

    seconds = []
    for _ in range(_PRODUCTS):
        start = time.perf_counter()
        for _done in in_order(computed, modules, num_workers(torch.device(device))):
            pass
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    moved = (experts + users) * values * 4
    print(json.dumps({"bytes_per_second": moved / statistics.median(seconds)}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
