"""This project: a batch whose rows each have a soup of their own, decoded; the costs of a change and of a user."""

from __future__ import annotations

import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import decoding
from benchmarks.ways.missing import give_up
from personalized_soups.declare.profile import Profile
from personalized_soups.mixing.model import SoupModel

_CHANGES = 50
_USERS = 2000


def main(
    experts: str,
    steps: int,
    *,
    base: str | None = None,
    config: Mapping[str, Any] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """Print tokens per second, the seconds for another mixture, and the bytes that a further user takes."""
    if device == "cuda" and not torch.cuda.is_available():
        give_up("no GPU here")
    model = decoding.made(config, device, dtype) if config else decoding.load(str(base), device, dtype)
    soup = SoupModel(model, experts)
    rows = [Profile(user=f"u{row}", weights=dict(weights)) for row, weights in enumerate(decoding.profiles())]
    with soup.mixture(rows):
        rate = decoding.tokens_per_second(soup.model, steps)
    changes = []
    for turn in range(_CHANGES):
        turned = rows[turn % len(rows) :] + rows[: turn % len(rows)]
        start = time.perf_counter()
        with soup.mixture(turned):
            if device == "cuda":
                torch.cuda.synchronize()
            changes.append(time.perf_counter() - start)
    print(json.dumps({
        "tokens_per_second": rate,
        "change_seconds": statistics.median(changes),
        "user_bytes": _bytes_of_a_user(soup, rows),
    }))  # fmt: skip


def _bytes_of_a_user(soup: Any, rows: list[Profile]) -> float:
    """Return what each of many users takes once the model knows them."""
    known = [rows[number % len(rows)].replaced(user=f"user-{number}") for number in range(_USERS)]
    tracemalloc.start()
    for profile in known:
        soup.profiles.add(profile)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return taken / _USERS


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
