"""The soups of a batch at one layer. All rows together cost as much as one adapter of rank K.

G gates (one for each row of the batch, one for each token, or one for all), M rows of the input for each gate, N = G M,
K sum of ranks, C rows of the distinct A's, D experts with a gain or a bias, I in features, O out features.
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
    """Return `y + B (g * A x)`, where row b of the input has the gates `g_b = w_b s`, with DoRA and lora_bias.

    `y_b = d_b (W x_b) + bias + sum_e w_be s_e (B_e A_e x_b + c_e)` with `d_b = 1 + sum_e w_be (D_e - 1)`, which is the
    merged model's output (algorithms.md, "Mixing on the fly"; DoRA: arXiv 2402.09353).

    Args:
        x: `[..., I]`; the product of the leading sizes is G M.
        y: `[..., O]`, the output of the base's layer. Changed in place if no gradient is needed.
        stack: the layer's experts, in x's dtype and on its device.
        spans: the parts of the stack that the batch uses.
        gate_GC: `[G, stack.width]`, in x's dtype and on its device.
        bias_O: the bias of the base's layer, which DoRA does not scale.
        ax: `A x` of the only span, `[..., C]`, if it is computed already. Its rows need not be contiguous.

    Returns:
        A tensor of y's shape, dtype and device.
    """
    # num_ranks counts the ranks of all experts, also of those that the batch does not use.
    num_gates, num_ranks = gate_GC.shape[0], sum(stack.ranks)
    y = _with_gains(y, stack, gate_GC, num_ranks, bias_O)
    # Gate columns are [ranks, gains, biases]; a span covers neighbouring ranks.
    for span in spans:
        ax_of_span = functional.linear(x, span.a_CI) if ax is None else ax
        y = _plus_gated(y, ax_of_span, gate_GC[:, span.start : span.stop], span.factors)
    if stack.biases_DO is not None:
        # c_e is scaled by w s, like B: a lora_bias is the bias of B's layer.
        added_GO = gate_GC[:, num_ranks + len(stack.gained) :] @ stack.biases_DO
        y = (y.reshape(num_gates, -1, y.shape[-1]) + added_GO[:, None, :].to(y.dtype)).view_as(y)
    return y


def _with_gains(y: Tensor, stack: Stack, gate_GC: Tensor, num_ranks: int, bias_O: Tensor | None) -> Tensor:
    """Return `y + (d - 1) W x` for DoRA; y itself without DoRA."""
    if stack.gains_DO is None:
        return y
    # sum_e w_e (D_e - 1) for each gate: a row for each expert with DoRA.
    more_GO = gate_GC[:, num_ranks : num_ranks + len(stack.gained)] @ stack.gains_DO
    # y is W x + bias; subtracting the bias again costs less than a second product, and rounds once more.
    product = y if bias_O is None else y - bias_O.to(y.dtype)
    y_GMO = y.reshape(gate_GC.shape[0], -1, y.shape[-1])
    return torch.addcmul(y_GMO, product.reshape(y_GMO.shape), more_GO[:, None, :].to(y.dtype)).view_as(y)


def _plus_gated(y: Tensor, ax: Tensor, gate_GK: Tensor, factors: BlockDiagonal) -> Tensor:
    """Return `y + (ax * gate) B`. If y may be changed, the sum is made in place and rounded once."""
    y_NO, ax_NC = y.reshape(-1, y.shape[-1]), ax.reshape(-1, ax.shape[-1])
    # A span of one layer is one block; a group has a block for each layer.
    (b_KO,) = factors.blocks
    # With gradients nothing may be changed in place. Under autocast y has another dtype than the factors. `reshape`
    # copies a y that is not contiguous, so a change of the copy would be lost.
    if torch.is_grad_enabled() or not y.dtype == ax.dtype == b_KO.dtype or not y.is_contiguous():
        return (y_NO + (gated(ax_NC, gate_GK, factors.columns_K) @ b_KO).to(y.dtype)).view_as(y)
    add_gated(y_NO, ax_NC, gate_GK, factors)
    return y
