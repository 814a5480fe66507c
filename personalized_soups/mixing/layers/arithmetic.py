"""Compute the soups of a batch at one layer. All soups together cost as much as one adapter of rank K.

A gate holds, for each rank, the weight w of the rank's expert times the expert's scaling s.

Shapes: G = gates (one for each profile, one for each token, or one for all rows), M = rows of the input for each gate,
N = G * M, K = sum of the ranks, C = rows of the distinct A's, D = experts with a gain or a bias, I = in_features,
O = out_features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from personalized_soups.kernels.add_gated import BlockDiagonal, add_gated, gated
from personalized_soups.mixing.layers.stack import Span, Stack


def mixed(
    x: Tensor,
    y: Tensor,
    stack: Stack,
    spans: Sequence[Span],
    gate_GC: Tensor,
    *,
    bias_O: Tensor | None = None,
    ax: Tensor | None = None,
) -> Tensor:
    """Return `y + B (g * A x)`, where row b of the input has the gates `g_b = w_b s`, plus the terms of DoRA and bias.

    In full, row b of the result is `d_b (W x_b) + bias + sum_e w_be s_e (B_e A_e x_b + c_e)` for the experts e. Here
    `d_b = 1 + sum_e w_be (D_e - 1)`, where D_e is the DoRA factor and c_e the lora_bias of expert e. This is the output
    of the merged model (algorithms.md, "Mixing on the fly"; DoRA: arXiv 2402.09353).

    Args:
        x: the layer's input, `[..., I]`. It has G * M rows.
        y: the output of the base's layer, `[..., O]`. If no gradient is needed, y may be changed in place.
        stack: the layer's stack, in x's dtype and on its device.
        spans: the parts of the stack that the batch uses.
        gate_GC: the layer's gates, `[G, stack.width]`, in x's dtype and on its device.
        bias_O: the bias of the base's layer. It is not scaled by DoRA.
        ax: `A x`, `[..., C]`, if it is computed already. Then `spans` has only one span. `ax` need not be contiguous.

    Returns:
        A tensor of y's shape, dtype and device.
    """
    # num_ranks counts the ranks of all experts, even if the batch does not use them.
    num_gates, num_ranks = gate_GC.shape[0], sum(stack.ranks)
    y = _with_gains(y, stack, gate_GC, num_ranks, bias_O)
    # The columns of the gates are [ranks, gains, biases]. A span covers contiguous ranks.
    for span in spans:
        ax_of_span = functional.linear(x, span.a_CI) if ax is None else ax
        y = _plus_gated(y, ax_of_span, gate_GC[:, span.start : span.stop], span.factors)
    if stack.biases_DO is not None:
        # The lora_bias is the bias of B's layer, so it is multiplied by w s, like B.
        added_GO = gate_GC[:, num_ranks + len(stack.gained) :] @ stack.biases_DO
        y = (y.reshape(num_gates, -1, y.shape[-1]) + added_GO[:, None, :].to(y.dtype)).view_as(y)
    return y


def _with_gains(y: Tensor, stack: Stack, gate_GC: Tensor, num_ranks: int, bias_O: Tensor | None) -> Tensor:
    """Return `y + (d - 1) W x` if the stack has DoRA experts, else y itself."""
    if stack.gains_DO is None:
        return y
    # d - 1 for each gate, which is sum_e w_e (D_e - 1).
    more_GO = gate_GC[:, num_ranks : num_ranks + len(stack.gained)] @ stack.gains_DO
    # y is W x + bias. Subtracting the bias is faster than computing W x again, although it rounds once more.
    product = y if bias_O is None else y - bias_O.to(y.dtype)
    y_GMO = y.reshape(gate_GC.shape[0], -1, y.shape[-1])
    return torch.addcmul(y_GMO, product.reshape(y_GMO.shape), more_GO[:, None, :].to(y.dtype)).view_as(y)


def _plus_gated(y: Tensor, ax: Tensor, gate_GK: Tensor, factors: BlockDiagonal) -> Tensor:
    """Return `y + (ax * gate) B`. If y may be changed, the sum is computed in place and rounded once."""
    y_NO, ax_NC = y.reshape(-1, y.shape[-1]), ax.reshape(-1, ax.shape[-1])
    # The factors of one layer are one block.
    (b_KO,) = factors.blocks
    # y is not changed in place in three cases: gradients need the old y; under autocast, y and the factors differ in
    # dtype; and `reshape` copies a y that is not contiguous, so that the change would be made in the copy.
    if torch.is_grad_enabled() or not y.dtype == ax.dtype == b_KO.dtype or not y.is_contiguous():
        return (y_NO + (gated(ax_NC, gate_GK, factors.columns_K) @ b_KO).to(y.dtype)).view_as(y)
    add_gated(y_NO, ax_NC, gate_GK, factors)
    return y
