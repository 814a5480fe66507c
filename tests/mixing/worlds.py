"""Experts and prompts for the tests of mixing, and their oracle: a float64 model with the soup folded in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from personalized_soups import SoupModel
from tests import oracles
from tests.experts import SHAPES, write_expert

WeightsOf = Mapping[str, float]

# The largest relative error of float32 logits at these sizes.
LOGITS = 1e-5


def write_experts(folder: Path, **fields: Any) -> list[Path]:
    """Write three experts of different ranks, scalings and modules; one is an rsLoRA."""
    some = {name: SHAPES[name] for name in list(SHAPES)[::2]}
    return [
        write_expert(folder / "cold", seed=1, rank=4, alpha=8, **fields),
        write_expert(folder / "plain", seed=2, rank=2, alpha=6, shapes=some, **fields),
        write_expert(folder / "warm", seed=3, rank=3, alpha=5, use_rslora=True, **fields),
    ]


def write_shared(folder: Path) -> list[Path]:
    """Write three experts with one A."""
    names = ("cold", "plain", "warm")
    return [write_expert(folder / name, seed=place, a_seed=7) for place, name in enumerate(names)]


def open_model(base: Path, experts: Path, **options: Any) -> SoupModel:
    return SoupModel.from_pretrained(base, experts, **{"device": "cpu", **options})


def float64_model(base: Path, experts: Sequence[Path] = (), weights: Sequence[float] = ()) -> Any:
    """Return the base in float64 with the dense soup, which NumPy computes, added."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    layers = dict(model.named_modules())
    for module, delta in oracles.soup(experts, weights).items():
        # a Conv1D has [in, out]
        turned = delta if layers[module].weight.shape == delta.shape else delta.T
        with torch.no_grad():
            layers[module].weight += torch.from_numpy(np.ascontiguousarray(turned))
    return model


def true_logits(base: Path, folders: Sequence[Path], weights: WeightsOf | None, ids_T: Tensor) -> Tensor:
    """Return one row's logits, `[T, V]` in float64, of its merged model."""
    named = [(folder, weights.get(folder.name, 0.0)) for folder in folders] if weights else []
    model = float64_model(base, [folder for folder, _ in named], [weight for _, weight in named])
    with torch.no_grad():
        result: Tensor = model(input_ids=ids_T[None]).logits[0]
    return result


def relative(got: Tensor, want: Tensor) -> float:
    return oracles.relative_error(got.double().cpu().numpy(), want.double().cpu().numpy())


def random_ids(rows: int, tokens: int, *, seed: int = 0, vocab: int = 300) -> Tensor:
    return torch.randint(6, vocab, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def vocab_of(base: Path) -> int:
    return int(json.loads((base / "config.json").read_text())["vocab_size"])
