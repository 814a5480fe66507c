"""PEFT: the same batch with an adapter for every row, each merged before by `cat` from the six experts.

Its mixed batches take one adapter a row and no weights, so a mixture must be an adapter. Making them is not counted.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from peft import PeftModel

from benchmarks import decoding


def main(experts: str, steps: int, base: str) -> None:
    """Print tokens per second."""
    rows = decoding.profiles()
    names = list(rows[0])
    model: Any = PeftModel.from_pretrained(decoding.load(base, "cpu", "float32"), f"{experts}/{names[0]}", names[0])
    for name in names[1:]:
        model.load_adapter(f"{experts}/{name}", adapter_name=name)
    mixtures = []
    for number, weights in enumerate(rows):
        mixtures.append(f"row{number}")
        model.add_weighted_adapter(names, list(weights.values()), mixtures[-1], combination_type="cat")
    for name in names:
        model.delete_adapter(name)
    model.eval()
    print(json.dumps({"tokens_per_second": decoding.tokens_per_second(model, steps, adapter_names=mixtures)}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
