"""Compute many modules on several threads, and return the results in order, with a bounded number computed ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# For a base in 16 bits, each thread needs 16 MiB of pinned memory, and on the GPU 24 MiB and the terms of one tensor.
_MOST_FILE_THREADS = 4


def num_workers(device: torch.device) -> int:
    """Return the number of threads for a merge's arithmetic: torch's number of threads on a CPU, one for a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def num_file_threads(device: torch.device) -> int:
    """Return the number of threads that fold tensors into files: as for the arithmetic on a CPU, a few for a GPU.

    One thread cannot feed a GPU: a copy into pinned memory and a write take several times as long as their transfers.
    """
    return torch.get_num_threads() if device.type == "cpu" else min(_MOST_FILE_THREADS, torch.get_num_threads())


def in_order(function: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order, computed on `num_threads` threads.

    Each of these threads runs torch's operations on one thread, so an item's bytes do not depend on `num_threads`. At
    most two results per thread are computed ahead, which bounds the memory. With one thread, the caller's computes.
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
    """Multiply float32 as float32 within the block. TF32 or bfloat16, if the process allows them, would be 1e-3 off."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def worker_pool(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool whose threads run torch's operations on one thread each. The block's end cancels waiting tasks."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="merge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # OpenMP's number of threads is per thread, MKL's per process: a worker's setting reaches the caller through MKL
        torch.set_num_threads(before)
