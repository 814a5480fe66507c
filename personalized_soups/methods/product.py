"""Many users at once: the weighted sums of E tensors for U users are one matrix product.

E experts, U users, P numbers of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Numbers of each expert that are multiplied at once: with six experts and sixteen users 5 MiB, near enough to a core.
_CHUNK = 1 << 16


def weighted_sums(weights_UE: Tensor, tensors: Sequence[Tensor], out_UP: Tensor | None = None) -> Tensor:
    """Return `out[u] = sum_e weights[u, e] tensors[e]`, every tensor flattened.

    Each tensor is read once, whatever the number of users is; a stack of them is never formed whole. The sums are taken
    in the tensors' own dtype, float32 or float64: `|err| <= (E + 1) u sum |w| |x|` with its unit roundoff u (Higham,
    Accuracy and Stability, section 3.1; one more for the rounded weight).

    Args:
        weights_UE: on any device and in any floating dtype; rounded to the tensors'.
        tensors: E tensors of one shape, dtype and device, each contiguous.
        out_UP: where the sums shall stand, in the tensors' dtype and on their device; new where left out.

    Raises:
        ValueError: if there are no tensors, or not as many as weights.
    """
    if not tensors or weights_UE.shape[1] != len(tensors):
        raise ValueError(f"{weights_UE.shape[1]} weights for {len(tensors)} tensors")
    flat = [tensor.reshape(-1) for tensor in tensors]
    size = flat[0].numel()
    weights = weights_UE.to(flat[0].device, flat[0].dtype)
    out = flat[0].new_empty(weights.shape[0], size) if out_UP is None else out_UP
    chunk = flat[0].new_empty(len(flat), min(_CHUNK, size))
    for start in range(0, size, _CHUNK):
        end = min(start + _CHUNK, size)
        part = chunk[:, : end - start]
        torch.stack([each[start:end] for each in flat], out=part)
        torch.mm(weights, part, out=out[:, start:end])
    return out
