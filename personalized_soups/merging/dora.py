"""DoRA: what an expert with magnitudes multiplies its outputs by (arXiv 2402.09353).

O out features, M rows and N columns of a base's matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from personalized_soups.adapters.placement import Placement, add_parts, squared_norms
from personalized_soups.methods.factors import Factors

# Rows of the base that are summed at once.
_ROWS = 4096


def squared_output_norms(base_MN: Tensor, placement: Placement, factors: Factors) -> Tensor:
    """Return `|W + s B A|^2` of each output, `[O]` in float64 on the CPU; memory: some rows of the base.

    Args:
        base_MN: the base's tensor as a matrix, on the CPU in its own dtype.
        placement: where the change stands in it.
        factors: of the change, in the dtype of the arithmetic, on any device.
    """
    parts = placement.parts(factors)
    found = []
    for start in range(0, base_MN.shape[0], _ROWS):
        rows = base_MN[start : start + _ROWS].to(factors.a_RI.device, factors.a_RI.dtype, copy=True)
        add_parts(rows, parts, factors.scaling, start)
        found.append(squared_norms(rows, placement.output_axis).cpu())
    return torch.cat(found) if placement.output_axis == 0 else torch.stack(found).sum(dim=0)


def row_gains(base_MN: Tensor, placement: Placement, factors: Factors, magnitude_O: Tensor) -> Tensor:
    """Return D: the trained magnitude of each output over the norm of `W + s B A`, `[O]` in float64 on the CPU."""
    return magnitude_O.double().cpu() / squared_output_norms(base_MN, placement, factors).sqrt()
