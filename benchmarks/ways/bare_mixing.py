"""The bare base, as transformers has it: the same batch, decoded."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import decoding
from benchmarks.ways.missing import give_up


def main(
    steps: int,
    base: str | None = None,
    config: Mapping[str, Any] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """Print tokens per second."""
    if device == "cuda" and not torch.cuda.is_available():
        give_up("no GPU here")
    model = decoding.made(config, device, dtype) if config else decoding.load(str(base), device, dtype)
    print(json.dumps({"tokens_per_second": decoding.tokens_per_second(model, steps)}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
