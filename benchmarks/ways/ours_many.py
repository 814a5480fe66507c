"""This project, from Python: one adapter folder for each of many profiles."""

from __future__ import annotations

import json
import sys
import time

import torch

from benchmarks.profiles import random_weights
from benchmarks.ways.missing import give_up
from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile
from personalized_soups.merging.planning.options import MergeOptions
from personalized_soups.merging.writing.many import merge_many


def main(experts: str, count: int, out: str, device: str = "cpu") -> None:
    """Print the seconds from the opening of the experts to the last folder; CUDA is started before."""
    if device == "cuda":
        if not torch.cuda.is_available():
            give_up("no GPU here")
        torch.zeros(1, device=device)
    profiles = [Profile(user=user, weights=weights) for user, weights in random_weights(count).items()]
    start = time.perf_counter()
    merge_many(ExpertLibrary.open(experts), profiles, out, MergeOptions(device=device))
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
