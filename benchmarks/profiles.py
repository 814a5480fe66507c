"""The weights with which experts are merged."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from benchmarks.shapes import NUM_EXPERTS

# They sum to 1: mergekit's `linear` of `base + adapter` is then the base plus the weighted sum of the deltas.
THREE: Mapping[str, float] = MappingProxyType({"e0": 0.5, "e1": 0.3, "e2": 0.2})
SIX: Mapping[str, float] = MappingProxyType({"e0": 0.4, "e1": 0.3, "e2": 0.2, "e3": -0.1, "e4": 0.15, "e5": 0.05})


def random_weights(count: int) -> dict[str, dict[str, float]]:
    """Return the weights of so many users over all six experts, the same each time."""
    draw = random.Random(0)
    return {
        f"u{user:03d}": {f"e{expert}": draw.uniform(0.05, 0.5) for expert in range(NUM_EXPERTS)}
        for user in range(count)
    }


def as_option(weights: Mapping[str, float]) -> str:
    """Return weights as `--weights` takes them."""
    return ",".join(f"{name}={weight}" for name, weight in weights.items())


def write_lines(path: Path, count: int) -> Path:
    """Write the profiles of so many users, one JSON object a line."""
    lines = [json.dumps({"user": user, "weights": weights}) for user, weights in random_weights(count).items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
