"""PEFT: the sum of experts truncated to a rank, for the seven modules of one layer.

Every layer has the same shapes, so the whole model takes this times the number of layers. The decomposition is asked
for without full matrices: PEFT's default computes them, takes far longer and throws them away. The base's values do not
enter, so a base of one layer is made on the spot.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM


def main(experts: str, weights: dict[str, float], base: str, rank: int) -> None:
    """Print the seconds that add_weighted_adapter takes for one layer, and the number of layers; nothing is written."""
    config = AutoConfig.from_pretrained(base)
    layers = config.num_hidden_layers
    config.num_hidden_layers = 1
    names = list(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the experts' other layers have no place in this model
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = PeftModel.from_pretrained(model, f"{experts}/{names[0]}", adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(f"{experts}/{name}", adapter_name=name)
    start = time.perf_counter()
    model.add_weighted_adapter(
        names, list(weights.values()), "soup", combination_type="svd", svd_rank=rank, svd_full_matrices=False
    )
    print(json.dumps({"seconds": time.perf_counter() - start, "layers": layers}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
