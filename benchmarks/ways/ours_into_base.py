"""This project, from Python: experts into their base, a full model folder."""

from __future__ import annotations

import json
import sys
import time

import torch

from benchmarks.ways.missing import give_up
from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile
from personalized_soups.merging.planning.options import MergeOptions
from personalized_soups.merging.writing.into_base import merge_into_base


def main(experts: str, weights: dict[str, float], base: str, out: str, device: str = "cpu") -> None:
    """Print the seconds from the opening of the experts to the finished folder; CUDA is started before."""
    if device == "cuda":
        if not torch.cuda.is_available():
            give_up("no GPU here")
        torch.zeros(1, device=device)
    start = time.perf_counter()
    merge_into_base(ExpertLibrary.open(experts), Profile(weights=weights), base, out, MergeOptions(device=device))
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
