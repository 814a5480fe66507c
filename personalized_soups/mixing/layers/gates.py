"""The gates of the current batch: the factors by which the stacked ranks of every layer are multiplied.

A gate is the factors for one row or several rows of the batch, for one token, or for all rows. For each rank, it holds
the weight of the rank's expert times the expert's scaling.

Shapes: G = gates, E = experts of the model, S = wrapped layers, C = columns of all layers' stacks together,
I = in_features, N = G, or G * S where weights differ by layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from personalized_soups.errors import UsageError
from personalized_soups.mixing.layers.gate_layout import GateLayout
from personalized_soups.mixing.layers.held_product import HeldProduct
from personalized_soups.mixing.layers.stack import Stack


class Gates:
    """Holds the gates in buffers `[G, C]`, whose addresses and shapes stay the same when weights are set.

    So after a change of weights, compiled code is not compiled again, and CUDA graphs stay valid. A captured CUDA graph
    keeps using the address of a buffer, so no buffer is freed before the stacks change. There is one buffer for each
    power of two, and G gates use the first G rows of the smallest buffer that is large enough. All layers of a model
    share one Gates object, and read views of its buffers.

    Attributes:
        layout: which weight and which scaling each column holds.
        is_on: whether weights are set. If not, layers return the base's own output.
        rows_each: the number of consecutive rows of the batch that each gate is for, such as the beams of a prompt or
            several answers to it. None if one gate is for all rows.
        used: the experts that have a weight other than 0 in at least one gate.
        token_rows: an int64 tensor of the batch's shape: the number of each token's gate. None if all tokens of a row
            have the same gate.
        num_tokens: the number of tokens of the current batch, which the model's forward hook sets.
        held: the product that a group of layers has computed, until every layer has taken its part; None if there is
            no such product.
    """

    def __init__(self) -> None:
        # Layers get the gates as attributes, because transformers calls the layers and passes no extra arguments.
        self.is_on = False
        self.rows_each: int | None = None
        self.used: frozenset[str] = frozenset()
        self.token_rows: Tensor | None = None
        self.num_tokens = 0
        self.held: HeldProduct | None = None
        # One view of the current buffer for each product. A layer slices its own columns from the view.
        self._views: tuple[Tensor, ...] = ()
        self._buffers: dict[int, Tensor] = {}
        self.lay_out((), ())

    def lay_out(
        self, experts: Sequence[str], stacks: Sequence[Stack], products: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Replace the layout, and free the buffers of the old layout. The arguments are those of `GateLayout`."""
        # The old buffers have the widths, dtype and device of the old layout.
        self.layout = GateLayout(experts, stacks, products)
        self._buffers.clear()
        self._views = ()

    def is_like(self, tensor: Tensor) -> bool:
        """Return whether the gates have the dtype and device of `tensor`."""
        return self.layout.dtype == tensor.dtype and self.layout.device == tensor.device

    def of(self, slot: int) -> Tensor:
        """Return the gates of the layer with that slot, `[G, width]`, in the stacks' dtype and on their device."""
        columns = self.layout.columns_of(slot)
        view = self._views[columns.product]
        # A product of one layer needs no slice, which saves a call for each such layer.
        return view if view.shape[1] == columns.width else view.narrow(1, columns.start, columns.width)

    def of_group(self, slot: int) -> Tensor:
        """Return the concatenated gates of all layers in a group. `slot` is the slot of any of these layers."""
        return self._views[self.layout.columns_of(slot).product]

    def fitted(self, x: Tensor, gate_GC: Tensor, layer: str) -> Tensor:
        """Check that the gates fit a layer's input, and return them. With `token_rows`, return one gate for each token.

        Args:
            x: the layer's input, `[..., I]`.
            gate_GC: the result of `of` or `of_group`.
            layer: the layer's name, which errors mention.

        Raises:
            UsageError: if the number of rows or tokens of x is not that of the mixture.
        """
        if self.token_rows is not None:
            _check_tokens(x, self.token_rows, layer)
            # The result has one row for each of the flattened tokens.
            return gate_GC.index_select(0, self.token_rows.to(gate_GC.device).flatten())
        if self.rows_each is not None:
            self._check_rows(x, gate_GC.shape[0], self.rows_each, layer)
        return gate_GC

    def clear(self) -> None:
        """Release the held product, if layers have not taken all its parts."""
        self.held = None

    def set(self, weights_GE: Tensor, layered_GSE: Tensor | None = None) -> None:
        """Write every layer's gates in place. The arguments are those of `GateLayout.spread`."""
        buffer_GC = self._buffer(weights_GE.shape[0])
        self._views = buffer_GC.split(self.layout.widths, dim=1)
        buffer_GC.copy_(self.layout.spread(weights_GE, layered_GSE))  # gates are rounded to the stacks' dtype only here
        # The tables are on the CPU, so this does not wait for the GPU.
        weights_NE = weights_GE if layered_GSE is None else layered_GSE.flatten(0, 1)
        is_used = (weights_NE != 0).any(dim=0).tolist()
        self.used = frozenset(name for name, is_set in zip(self.layout.experts, is_used, strict=True) if is_set)

    def _check_rows(self, x: Tensor, num_gates: int, rows_each: int, layer: str) -> None:
        if x.dim() < 3:
            # Models like OPT flatten the batch. If a layer gets only some tokens, their rows are unknown.
            have, want = x.shape[0], self.num_tokens
            # If it gets all tokens, each gate is for equally many of them, in the order of the rows.
            if have % num_gates == 0 and (have == want or torch.compiler.is_compiling()):
                return
            raise UsageError(
                f"{layer} gets a flat list of {have} tokens, but the batch has {want} tokens for {num_gates} profiles",
                where=layer,
                mend="run one profile at a time: `with model.mixture(profile)`. A layer that gets only the tokens that "
                "a router sends to it cannot be mixed",
            )
        # The numbers must be equal: with a multiple, rows would silently get the profiles of other rows.
        if x.shape[0] != num_gates * rows_each:
            raise UsageError(
                f"the mixture is for {num_gates * rows_each} rows ({num_gates} profiles, rows_each={rows_each}), but "
                f"the batch has {x.shape[0]} rows",
                where="profiles",
                mend="give one profile for each prompt. With n beams, or n answers to each prompt, use "
                "mixture(profiles, rows_each=n)",
            )

    def _buffer(self, num_gates: int) -> Tensor:
        # With powers of two, all buffers together take less than twice the memory of the largest buffer.
        capacity = 1 << (num_gates - 1).bit_length()
        if capacity not in self._buffers:
            with torch.inference_mode(False):  # a tensor created in inference mode cannot be changed outside of it
                self._buffers[capacity] = torch.zeros(
                    capacity, sum(self.layout.widths), dtype=self.layout.dtype, device=self.layout.device
                )
        return self._buffers[capacity][:num_gates]


def _check_tokens(x: Tensor, token_rows: Tensor, layer: str) -> None:
    is_flat = x.dim() < 3
    if x.shape[:-1] != (token_rows.flatten().shape if is_flat else token_rows.shape):
        raise UsageError(
            f"the tokens that {layer} gets have shape {list(x.shape[:-1])}, but rows has shape "
            f"{list(token_rows.shape)}",
            where="rows",
            mend="give mixture(profiles, rows=...) a tensor that has the shape of input_ids",
        )
