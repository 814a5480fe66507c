"""The gates of the current batch: by how much each of its rows weighs every stacked rank of every layer.

G gates, E experts of the model, S layers, C columns: the widths of all layers' stacks, concatenated, I in features.
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
    """Buffers `[G, C]` that never move: setting weights changes no address and no shape.

    So a change of weights compiles nothing again and breaks no CUDA graph. A captured graph keeps a buffer's address
    for ever, so no buffer is freed before the stacks change. There is one buffer for each power of two of rows; a
    smaller batch uses its first rows. All layers of a model share one Gates object, and read views of its buffers.

    Attributes:
        layout: what each column holds.
        is_on: whether weights are set. If not, layers return the base's own output.
        rows_each: how many consecutive rows of the batch each gate is for: beams, or several answers to a prompt. None
            if one gate is for all rows.
        used: the experts with at least one gate that is not zero.
        token_rows: int64, of the batch's shape: the gate of each token. None if a row has one gate for all its tokens.
        num_tokens: the number of tokens of the current batch, which the model's forward hook counts.
        held: the product of a group of layers, until every layer has taken its part.
    """

    def __init__(self) -> None:
        # Attributes and not arguments: layers are called by transformers, which passes no extra arguments through.
        self.is_on = False
        self.rows_each: int | None = None
        self.used: frozenset[str] = frozenset()
        self.token_rows: Tensor | None = None
        self.num_tokens = 0
        self.held: HeldProduct | None = None
        # One view of the current buffer for each product: a layer slices its own columns from it.
        self._views: tuple[Tensor, ...] = ()
        self._buffers: dict[int, Tensor] = {}
        self.lay_out((), ())

    def lay_out(
        self, experts: Sequence[str], stacks: Sequence[Stack], products: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Replace the layout, and free the buffers of the old one. Arguments as for `GateLayout`."""
        # The buffers have the old widths, dtype and device.
        self.layout = GateLayout(experts, stacks, products)
        self._buffers.clear()
        self._views = ()

    def is_like(self, tensor: Tensor) -> bool:
        """Return whether the gates have a tensor's dtype and device."""
        return self.layout.dtype == tensor.dtype and self.layout.device == tensor.device

    def of(self, slot: int) -> Tensor:
        """Return a layer's gates, `[G, width]`, in the stacks' dtype and on their device: `w s` for each rank."""
        columns = self.layout.columns_of(slot)
        view = self._views[columns.product]
        # A view that is a whole product needs no slice, which saves a call for each layer.
        return view if view.shape[1] == columns.width else view.narrow(1, columns.start, columns.width)

    def of_group(self, slot: int) -> Tensor:
        """Return the gates of all layers of a group, concatenated. `slot` is that of any of its layers."""
        return self._views[self.layout.columns_of(slot).product]

    def fitted(self, x: Tensor, gate_GC: Tensor, layer: str) -> Tensor:
        """Return a layer's gates such that each gate is for equally many rows of the layer's input.

        Args:
            x: the layer's input, `[..., I]`.
            gate_GC: the result of `of` or `of_group`.
            layer: the layer's name, for errors.

        Raises:
            UsageError: if x does not have the rows, or the tokens, that the mixture is for.
        """
        if self.token_rows is not None:
            _check_tokens(x, self.token_rows, layer)
            # Each token has its own gates, so the flattened tokens are the gates' rows.
            return gate_GC.index_select(0, self.token_rows.to(gate_GC.device).flatten())
        if self.rows_each is not None:
            self._check_rows(x, gate_GC.shape[0], self.rows_each, layer)
        return gate_GC

    def clear(self) -> None:
        """Release a product whose remaining parts no layer will take."""
        self.held = None

    def set(self, weights_GE: Tensor, layered_GSE: Tensor | None = None) -> None:
        """Write every layer's gates in place. Arguments as for `GateLayout.spread`."""
        buffer_GC = self._buffer(weights_GE.shape[0])
        self._views = buffer_GC.split(self.layout.widths, dim=1)
        buffer_GC.copy_(self.layout.spread(weights_GE, layered_GSE))  # the only rounding to the stacks' dtype
        # From the CPU's tables, so that nothing waits for the GPU.
        weights_NE = weights_GE if layered_GSE is None else layered_GSE.flatten(0, 1)
        is_used = (weights_NE != 0).any(dim=0).tolist()
        self.used = frozenset(name for name, is_set in zip(self.layout.experts, is_used, strict=True) if is_set)

    def _check_rows(self, x: Tensor, num_gates: int, rows_each: int, layer: str) -> None:
        if x.dim() < 3:
            # Models like OPT flatten the batch. A layer that gets only some of the tokens cannot know whose they are.
            have, want = x.shape[0], self.num_tokens
            # A flat layer that has all tokens has equally many for each gate, in the rows' order.
            if have % num_gates == 0 and (have == want or torch.compiler.is_compiling()):
                return
            raise UsageError(
                f"{layer} gets {have} tokens as a flat list, but the batch has {want} tokens",
                where=layer,
                mend="run one profile at a time; a layer that gets only some of the tokens (behind a router) can't be "
                "mixed",
            )
        # Exact equality: twice as many rows would silently get the profiles of others.
        if x.shape[0] != num_gates * rows_each:
            raise UsageError(
                f"the mixture is for {num_gates} prompts of {rows_each} rows each, but the batch has {x.shape[0]} rows",
                where="profiles",
                mend="give one profile for each prompt; with beams, or several answers to a prompt, use "
                "mixture(..., rows_each=N)",
            )

    def _buffer(self, num_gates: int) -> Tensor:
        # Powers of two: all buffers together take less than twice the memory of the largest one.
        capacity = 1 << (num_gates - 1).bit_length()
        if capacity not in self._buffers:
            with torch.inference_mode(False):  # a tensor made in inference mode cannot be changed outside of it
                self._buffers[capacity] = torch.zeros(
                    capacity, sum(self.layout.widths), dtype=self.layout.dtype, device=self.layout.device
                )
        return self._buffers[capacity][:num_gates]


def _check_tokens(x: Tensor, token_rows: Tensor, layer: str) -> None:
    is_flat = x.dim() < 3
    if x.shape[:-1] != (token_rows.flatten().shape if is_flat else token_rows.shape):
        raise UsageError(
            f"{layer} gets tokens of shape {list(x.shape[:-1])}, but rows has shape {list(token_rows.shape)}",
            where="rows",
            mend="give rows=... of the shape of input_ids",
        )
