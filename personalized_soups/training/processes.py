"""Run one training in several processes (torchrun, accelerate launch). Only the first process writes and prints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from personalized_soups.errors import SoupError

Result = TypeVar("Result")


def is_first_process() -> bool:
    """Return whether this process writes and prints. It does if it has rank 0 or is the only process."""
    return os.environ.get("RANK", "0") == "0"


def num_processes() -> int:
    """Return the number of processes that train together: WORLD_SIZE, which the launcher sets, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_first_process(action: Callable[[], Result]) -> Result:
    """Run `action` on the first process. Every process returns its result or raises its SoupError."""
    if num_processes() == 1:
        return action()
    from accelerate.utils import broadcast_object_list

    outcome: list[object] = [None, None]  # the result, the error
    if is_first_process():
        try:
            outcome[0] = action()
        except SoupError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if isinstance(outcome[1], SoupError):
        raise outcome[1]
    result: Result = outcome[0]  # type: ignore[assignment] # sent by the first process
    return result


def wait_for_all() -> None:
    """Wait until every process has called this function."""
    if num_processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


@contextmanager
def together() -> Iterator[None]:
    """Leave the process group when the block ends normally or with a SoupError, which every process raises.

    Without this, threads of the process group may abort Python at its exit (SIGABRT, "terminate called").
    """
    try:
        yield
    except SoupError:
        _leave()
        raise
    _leave()


def _leave() -> None:
    if num_processes() > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
