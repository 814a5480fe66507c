"""A plain copy from memory to memory: torch's copy_, which is what the machine can do."""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

from benchmarks.ways.missing import give_up

_COPIES = 9


def main(num_bytes: int, threads: int = 0, source: str = "cpu", target: str = "cpu") -> None:
    """Print bytes per second, those read and those written together; host memory is pinned where a GPU takes part.

    Between host and GPU each byte crosses once and counts once.
    """
    on_gpu = "cuda" in {source, target}
    if on_gpu and not torch.cuda.is_available():
        give_up("no GPU here")
    if threads:
        torch.set_num_threads(threads)
    # filled, so that all pages are there
    one = torch.full((num_bytes,), 1, dtype=torch.uint8, device=source, pin_memory=on_gpu and source == "cpu")
    other = torch.full((num_bytes,), 2, dtype=torch.uint8, device=target, pin_memory=on_gpu and target == "cpu")
    seconds = []
    for _ in range(_COPIES):
        start = time.perf_counter()
        other.copy_(one)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    moved = num_bytes * (2 if source == target else 1)
    print(json.dumps({"bytes_per_second": moved / statistics.median(seconds)}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
