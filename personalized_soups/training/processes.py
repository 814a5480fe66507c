"""One training in several processes (torchrun, accelerate launch): the first one reads, decides and writes for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from personalized_soups.errors import SoupError

Result = TypeVar("Result")


def is_first_process() -> bool:
    """Return whether this is the process that writes and prints; alone, it is."""
    return os.environ.get("RANK", "0") == "0"


def num_processes() -> int:
    """Return how many processes train together, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_first_process(action: Callable[[], Result]) -> Result:
    """Return what `action` returns on the first process, on every process; a SoupError of it is raised on all."""
    if num_processes() == 1:
        return action()
    from accelerate.utils import broadcast_object_list

    told: list[object] = [None, None]
    if is_first_process():
        try:
            told[0] = action()
        except SoupError as error:
            told[1] = error
    broadcast_object_list(told)
    if isinstance(told[1], SoupError):
        raise told[1]
    result: Result = told[0]  # type: ignore[assignment] # what the first process sent
    return result


def wait_for_all() -> None:
    """Return when every process is here."""
    if num_processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


@contextmanager
def together() -> Iterator[None]:
    """Let go of the other processes when the block ends, well or with a SoupError, which all of them meet.

    Threads of a process group that still run can abort Python's exit (SIGABRT, "terminate called").
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
