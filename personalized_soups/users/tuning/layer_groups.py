"""Contiguous groups of a model's layers, as patterns of layer names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from personalized_soups.errors import UsageError

# The number of a transformer's layer is the first number between dots, as in `model.layers.3.mlp.up_proj`.
_NUMBERED = re.compile(r"^(?P<prefix>.*?\.(?P<number>\d+)\.)")


def layer_groups(layers: Sequence[str], num_groups: int) -> list[list[str]]:
    """Return the patterns of each group: the weights of experts may differ between groups.

    The numbered layers are split into contiguous groups of equal size; if that is impossible, the first groups have one
    layer more. Modules without a number, such as the output layer, belong to the last group.

    Args:
        layers: the names of the modules that experts adapt.
        num_groups: the number of groups.

    Returns:
        For each group, patterns for `ExpertWeights`. A module belongs to the group whose pattern matches it first.

    Raises:
        UsageError: if `num_groups` is less than 1 or exceeds the number of layers that experts adapt.

    Example:
        >>> layer_groups(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"], 2)
        [['model.layers.0.*'], ['model.layers.1.*', '*']]
    """
    found = {match["prefix"]: int(match["number"]) for layer in layers if (match := _NUMBERED.match(layer))}
    prefixes = sorted(found, key=lambda prefix: (found[prefix], prefix))
    numbers = sorted(set(found.values()))
    if not 1 <= num_groups <= len(numbers):
        raise UsageError(
            f"layer_groups is {num_groups}, but experts adapt {len(numbers)} numbered layers",
            where="layer_groups",
            mend=f"give a number from 1 to {len(numbers)}" if numbers else "leave out layer_groups",
        )
    size, more = divmod(len(numbers), num_groups)
    group_of: dict[int, int] = {}
    for group in range(num_groups):
        start = group * size + min(group, more)
        group_of |= dict.fromkeys(numbers[start : start + size + (group < more)], group)
    groups: list[list[str]] = [[] for _ in range(num_groups)]
    for prefix in prefixes:
        groups[group_of[found[prefix]]].append(f"{prefix}*")
    groups[-1].append("*")
    return groups
