"""How far each row's logits in a mixed batch are from those of its own merged model in float64, alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from benchmarks import decoding
from benchmarks.ways.presence import found


def main(experts: str, base: str, rows: int) -> None:
    """Print the largest relative error (norm of the difference over the norm) of so many rows."""
    ids = decoding.prompts(decoding.load(base, "cpu", "float32").config.vocab_size, "cpu")
    users = decoding.profiles()
    soup = found("personalized_soups.mixing.model", "SoupModel")(decoding.load(base, "cpu", "float32"), experts)
    with soup.mixture([dict(weights) for weights in users]), torch.no_grad():
        got = soup.model(input_ids=ids).logits.double()
    worst = 0.0
    for row in range(rows):
        true = decoding.load(base, "cpu", "float64")
        for name, weight in users[row].items():
            _fold(true, Path(experts) / name, weight)
        with torch.no_grad():
            want = true(input_ids=ids[row : row + 1]).logits[0]
        worst = max(worst, float((got[row] - want).norm() / want.norm()))
    print(json.dumps({"error": worst}))


def _fold(model: torch.nn.Module, expert: Path, weight: float) -> None:
    from safetensors.torch import load_file

    config = json.loads((expert / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(expert / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    for name, a_RI in tensors.items():
        if ".lora_A." in name:
            b_OR = tensors[name.replace(".lora_A.", ".lora_B.")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_parameter(f"{module}.weight").data.addmm_(b_OR.double(), a_RI.double(), alpha=weight * scaling)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
