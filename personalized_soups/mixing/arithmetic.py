"""The soups of a batch at one layer: every row's own, at the cost of one adapter of rank K for all of them.

G gates (one for each row of the batch, each token, or one for all), M rows of the input that each gate is for,
K sum of ranks, C rows of the distinct A's, D experts with a gain or a bias, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from personalized_soups.kernels.add_gated import BlockDiagonal, add_gated, gated
from personalized_soups.mixing.stack import Span, Stack


def mixed(
    x: Tensor,
    y: Tensor,
    stack: Stack,
    spans: Sequence[Span],
    gate_GC: Tensor,
    *,
    bias_O: Tensor | None = None,
    low: Tensor | None = None,
) -> Tensor:
    """Return `y + B (g * A x)` where row b of the input has the gate `g_b = w_b s`, with DoRA and lora_bias.

    `y_b = d_b (W x_b) + bias + sum_e w_be s_e (B_e A_e x_b + c_e)` with `d_b = 1 + sum_e w_be (D_e - 1)`: the merged
    model's own output (algorithms.md, "Mixing on the fly"; DoRA: arXiv 2402.09353).

    Args:
        x: `[..., I]`, its leading sizes together G M.
        y: `[..., O]`, what the base's layer made of it; changed in place where no gradient is asked for.
        stack: the layer's experts, in x's dtype and on its device.
        spans: the parts of the stack that the batch uses.
        gate_GC: `[G, stack.width]`, in x's dtype and on its device.
        bias_O: the base layer's bias: DoRA scales W x without it.
        low: `A x` of the only span, `[..., C]`, where it is computed already; its rows may be apart.

    Returns:
        y's shape, dtype and device.
    """
    num_gates, num_ranks = gate_GC.shape[0], sum(stack.ranks)
    y = _with_gains(y, stack, gate_GC, num_ranks, bias_O)
    for span in spans:
        low_of_span = functional.linear(x, span.a_CI) if low is None else low
        y = _plus_gated(y, low_of_span, gate_GC[:, span.start : span.stop], span.factors)
    if stack.biases_DO is not None:
        added_GO = gate_GC[:, num_ranks + len(stack.gained) :] @ stack.biases_DO
        y = (y.reshape(num_gates, -1, y.shape[-1]) + added_GO[:, None, :].to(y.dtype)).view_as(y)
    return y


def _with_gains(y: Tensor, stack: Stack, gate_GC: Tensor, num_ranks: int, bias_O: Tensor | None) -> Tensor:
    """Return `y + (d - 1) W x` for DoRA; y itself without."""
    if stack.gains_DO is None:
        return y
    more_GO = gate_GC[:, num_ranks : num_ranks + len(stack.gained)] @ stack.gains_DO
    product = y if bias_O is None else y - bias_O.to(y.dtype)
    y_GMO = y.reshape(gate_GC.shape[0], -1, y.shape[-1])
    return torch.addcmul(y_GMO, product.reshape(y_GMO.shape), more_GO[:, None, :].to(y.dtype)).view_as(y)


def _plus_gated(y: Tensor, low: Tensor, gate_GK: Tensor, factors: BlockDiagonal) -> Tensor:
    """Return `y + (low * gate) B`: in place, and rounded once, where y may be changed."""
    y_NO, low_NC = y.reshape(-1, y.shape[-1]), low.reshape(-1, low.shape[-1])
    (b_KO,) = factors.blocks
    # under autocast y is narrower than the factors
    if torch.is_grad_enabled() or not y.dtype == low.dtype == b_KO.dtype or not y.is_contiguous():
        return (y_NO + (gated(low_NC, gate_GK, factors.columns_K) @ b_KO).to(y.dtype)).view_as(y)
    add_gated(y_NO, low_NC, gate_GK, factors)
    return y
