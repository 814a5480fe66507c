"""The weights of a batch as tensors: one row for each gate, one column for each expert.

G gates, E experts, S layers.
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
    """Return weights_GE, float32 on the CPU, and layered_GSE if a weight differs between layers, else None.

    Raises:
        DeclarationError: if a pattern matches no layer.
    """
    # One tensor of the whole table, because filling a tensor cell by cell is slow.
    table = [[weight if isinstance(weight := row.get(name, 0.0), float) else 0.0 for name in experts] for row in rows]
    weights_GE = torch.tensor(table, dtype=torch.float32).reshape(len(rows), len(experts))
    by_layer = [
        # Weights by layer are rare, so plain batches pay only for this look.
        (gate, experts.index(name), name, weight)
        for gate, row in enumerate(rows)
        for name, weight in row.items()
        if isinstance(weight, Mapping)
    ]
    if not by_layer:
        return weights_GE, None
    layered_GSE = weights_GE[:, None, :].repeat(1, len(layers), 1)
    # Weights without patterns are the same in every layer; patterns replace an expert's column.
    for gate, expert, name, patterns in by_layer:
        layered_GSE[gate, :, expert] = torch.tensor(_of_layers(patterns, layers, name), dtype=torch.float32)
    return weights_GE, layered_GSE


def _of_layers(patterns: LayerWeights, layers: Sequence[str], expert: str) -> list[float]:
    idle = [pattern for pattern in patterns if not matches(pattern, layers)]
    if idle:
        raise DeclarationError(
            f"the pattern {idle[0]!r} matches no layer that experts adapt",
            where=f"weights.{expert}",
            mend=f"give patterns of names such as {layers[0]!r}: '*.mlp.*', '*.layers.0.*', '*'",
        )
    # The first pattern that matches counts; a layer that matches none has weight 0.
    return [
        next((weight for pattern, weight in patterns.items() if fnmatchcase(layer, pattern)), 0.0) for layer in layers
    ]
