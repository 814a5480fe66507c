"""This project: another soup set in a live model, again and again."""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

from benchmarks.profiles import random_weights
from benchmarks.ways.missing import give_up
from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile
from personalized_soups.merging.live.adapter import LiveAdapter

_ROUNDS = 9
_USERS = 8


def main(experts: str, device: str) -> None:
    """Print the seconds for one `set`, of many that follow each other with another user each."""
    if device == "cuda" and not torch.cuda.is_available():
        give_up("no GPU here")
    live = LiveAdapter(ExpertLibrary.open(experts), device=device)
    profiles = [Profile(user=user, weights=weights) for user, weights in random_weights(_USERS).items()]
    seconds = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        for profile in profiles:
            live.set(profile)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / len(profiles))
    print(json.dumps({"seconds": statistics.median(seconds[1:])}))  # the first round warms up


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
