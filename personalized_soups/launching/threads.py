"""Work on many modules at once: results come in the order of the items, a bounded number of them ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# For a base in 16 bits each of them holds 16 MiB of pinned memory, and on the GPU 24 MiB and the terms of one tensor.
_MOST_FILE_THREADS = 4


def num_workers(device: torch.device) -> int:
    """Return how many threads share a merge's arithmetic: torch's own count on a CPU, one where a GPU does it."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def num_file_threads(device: torch.device) -> int:
    """Return how many threads fold tensors into files: those that compute on a CPU, a few that feed a GPU.

    One thread cannot feed it: a copy into pinned memory and a write take several times as long as their transfers.
    """
    return torch.get_num_threads() if device.type == "cpu" else min(_MOST_FILE_THREADS, torch.get_num_threads())


def in_order(function: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order; computed on `num_threads` threads beside the caller's own.

    Every thread runs torch's operations by itself, so that an item's bytes are the same at any number of threads. At
    most two results a thread are computed ahead, which bounds the memory. With one thread nothing runs beside.
    """
    if num_threads <= 1:
        with full_precision():
            yield from map(function, items)
        return
    with full_precision(), worker_pool(num_threads) as pool:
        ahead: deque[Future[Result]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) >= 2 * num_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 as float32, whatever the process allows itself elsewhere: TF32 or bfloat16 would be 1e-3 off."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def worker_pool(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool whose threads run torch's operations by themselves; what was not begun is dropped on an error."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="merge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # OpenMP counts threads per thread, MKL per process: a worker's setting reaches the caller through MKL
        torch.set_num_threads(before)
