"""Compute many items on several threads and return the results in order. Few results are computed in advance."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# The maximum number of threads for a GPU. For a 16-bit base, each thread needs 16 MiB of pinned memory. On the GPU it
# needs 24 MiB and the terms of one tensor.
_MOST_FILE_THREADS = 4


def num_workers(device: torch.device) -> int:
    """Return the number of threads that compute a merge on `device`.

    For a CPU it is torch's number of threads, for a GPU it is 1.
    """
    return torch.get_num_threads() if device.type == "cpu" else 1


def num_file_threads(device: torch.device) -> int:
    """Return the number of threads that add deltas to the tensors of a base and write them to files.

    For a CPU it is torch's number of threads, for a GPU it is at most 4. One thread cannot keep a GPU busy: copying a
    tensor to pinned memory and writing the result to a file take several times as long as the transfers to the GPU.
    """
    return torch.get_num_threads() if device.type == "cpu" else min(_MOST_FILE_THREADS, torch.get_num_threads())


def in_order(function: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """Yield `function(item)` for each item, in the order of `items`. The results are computed on `num_threads` threads.

    At most two results per thread are computed in advance, which limits the memory. Each thread runs torch operations
    on one thread, so the result of an item does not depend on `num_threads`. If `num_threads` is 1, the thread of the
    caller computes the results.
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
    """Multiply float32 matrices in full precision within the block. TF32 or bfloat16 would cause errors of 1e-3."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def worker_pool(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads, each of which runs torch operations on one thread.

    The end of the block cancels the tasks that have not started.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="merge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # OpenMP has a thread count for each thread. MKL has one for the process, which the workers have changed.
        torch.set_num_threads(before)
