"""PEFT: experts into their base, the script that a user would write.

merge_and_unload takes no weights: the weighted adapter is made first, which also rounds the base once, not three times.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - imports are not in the span, this one would be
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(experts: str, weights: dict[str, float], base: str, out: str) -> None:
    """Print the seconds from the loading of the base to the finished folder."""
    start = time.perf_counter()
    names = list(weights)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, f"{experts}/{names[0]}", adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(f"{experts}/{name}", adapter_name=name)
    model.add_weighted_adapter(names, list(weights.values()), "soup", combination_type="cat")
    model.set_adapter("soup")
    model.merge_and_unload().save_pretrained(out)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
