"""The weights of a batch as tensors: one row for each gate, one column for each expert.

Shapes: G = gates, E = experts of the model, S = wrapped layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from personalized_soups.declare.expert_weights import LayerWeights, Weight, matches
from personalized_soups.errors import DeclarationError


def weight_table(
    rows: Sequence[Mapping[str, Weight]], experts: Sequence[str], layers: Sequence[str]
) -> tuple[Tensor, Tensor | None]:
    """Return the weights of a batch as float32 tensors on the CPU.

    Args:
        rows: the weights of each gate, by the expert's name. A missing expert has weight 0.
        experts: the names of all experts of the model.
        layers: the names of all wrapped layers.

    Returns:
        A pair `(weights_GE, layered_GSE)`. If no weight differs between layers, `layered_GSE` is None. Otherwise,
        `layered_GSE` holds all weights, and `weights_GE` has 0 where a weight differs between layers.

    Raises:
        DeclarationError: if a pattern matches no layer.
    """
    # The tensor is made from one list, because filling a tensor cell by cell is slow.
    table = [[weight if isinstance(weight := row.get(name, 0.0), float) else 0.0 for name in experts] for row in rows]
    weights_GE = torch.tensor(table, dtype=torch.float32).reshape(len(rows), len(experts))
    by_layer = [
        # Weights by layer are rare. Without them, this list is empty, and nothing more is computed.
        (gate, experts.index(name), name, weight)
        for gate, row in enumerate(rows)
        for name, weight in row.items()
        if isinstance(weight, Mapping)
    ]
    if not by_layer:
        return weights_GE, None
    layered_GSE = weights_GE[:, None, :].repeat(1, len(layers), 1)
    # A weight without patterns is the same in every layer. Patterns replace an expert's column.
    for gate, expert, name, patterns in by_layer:
        layered_GSE[gate, :, expert] = torch.tensor(_of_layers(patterns, layers, name), dtype=torch.float32)
    return weights_GE, layered_GSE


def _of_layers(patterns: LayerWeights, layers: Sequence[str], expert: str) -> list[float]:
    idle = [pattern for pattern in patterns if not matches(pattern, layers)]
    if idle:
        raise DeclarationError(
            f"the pattern {idle[0]!r} matches no layer that experts adapt",
            where=f"weights.{expert}",
            mend=f"give a pattern such as '*.mlp.*', '*.layers.0.*' or '*', which matches layers such as {layers[0]!r}",
        )
    # The weight of a layer is that of the first pattern that matches its name, or 0 if no pattern matches.
    return [
        next((weight for pattern, weight in patterns.items() if fnmatchcase(layer, pattern)), 0.0) for layer in layers
    ]
