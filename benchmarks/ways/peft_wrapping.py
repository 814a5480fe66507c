"""PEFT: the same six experts loaded into the same base."""

from __future__ import annotations

import json
import sys
import time

from peft import PeftModel

from benchmarks import decoding
from benchmarks.shapes import NUM_EXPERTS


def main(experts: str, base: str) -> None:
    """Print the seconds for it."""
    model = decoding.load(base, "cpu", "float32")
    start = time.perf_counter()
    wrapped = PeftModel.from_pretrained(model, f"{experts}/e0", adapter_name="e0")
    for number in range(1, NUM_EXPERTS):
        wrapped.load_adapter(f"{experts}/e{number}", adapter_name=f"e{number}")
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
