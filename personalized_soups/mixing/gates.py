"""The gates of the batch that is running: by how much each of its rows weighs every stacked rank of every layer.

G gates, E experts of the model, S layers, C columns: the widths of all layers' stacks, one after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from personalized_soups.errors import UsageError
from personalized_soups.mixing.held_product import HeldProduct
from personalized_soups.mixing.stack import Stack


class Gates:
    """Buffers `[G, C]` that never move: setting weights changes no address and no shape.

    So nothing is compiled again and no CUDA graph breaks when the weights change: a graph that was captured may hold a
    buffer's address for ever, so none is let go before the stacks change. There is one for each power of two, of which
    a smaller batch takes the first rows. All layers of a model share one object; what a layer reads is a view.

    Attributes:
        is_on: whether a mixture is set; layers return the base's own output otherwise.
        rows_each: how many rows of the batch each gate stands for, one after another: beams, several answers; None
            where one gate is for all rows.
        used: the experts of which at least one gate is not zero.
        token_rows: int64, of the batch's shape, the gate of every token; None where a row has one for all its tokens.
        num_tokens: tokens of the batch that is running, which the model's forward tells.
        held: the product of a group of layers of which not every layer has taken its part yet.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.rows_each: int | None = None
        self.used: frozenset[str] = frozenset()
        self.token_rows: Tensor | None = None
        self.num_tokens = 0
        self.held: HeldProduct | None = None
        self._views: tuple[Tensor, ...] = ()
        self._buffers: dict[int, Tensor] = {}
        self.lay_out((), ())

    def lay_out(
        self, experts: Sequence[str], stacks: Sequence[Stack], units: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Take the layers' stacks, in the order of their slots, and forget the buffers of others.

        `units` says which slots stand one behind the other, for layers that are computed as a group; each by itself
        where it is left out.
        """
        self.experts = tuple(experts)
        order = [[slot] for slot in range(len(stacks))] if units is None else units
        self._widths = [sum(stacks[slot].width for slot in unit) for unit in order]
        # for each slot: its unit, the column of the unit's gates where its own begin, and how many those are
        self._places: dict[int, tuple[int, int, int]] = {}
        for number, unit in enumerate(order):
            start = 0
            for slot in unit:
                self._places[slot] = (number, start, stacks[slot].width)
                start += stacks[slot].width
        place = {expert: index for index, expert in enumerate(experts)}
        largest = dict.fromkeys(experts, 0.0)
        columns: list[int] = []
        layered: list[int] = []
        scales: list[float] = []
        for slot in chain.from_iterable(order):
            stack = stacks[slot]
            own = [place[expert] for expert in stack.experts]
            for index, scale in stack.gate_columns():
                columns.append(own[index])
                layered.append(slot * len(experts) + own[index])
                scales.append(scale)
                largest[stack.experts[index]] = max(largest[stack.experts[index]], abs(scale))
        self._largest = largest
        self._largest_E = torch.tensor(list(largest.values()), dtype=torch.float64)
        device = stacks[0].a_CI.device if stacks else torch.device("cpu")
        self._dtype = stacks[0].a_CI.dtype if stacks else torch.float32
        with torch.inference_mode(False):  # what is made in inference mode could not be changed outside of it
            self._columns_C = torch.tensor(columns, dtype=torch.int64, device=device)
            self._layered_C = torch.tensor(layered, dtype=torch.int64, device=device)
            self._scales_C = torch.tensor(scales, dtype=torch.float32, device=device)
        self._buffers.clear()
        self._views = ()

    def is_like(self, tensor: Tensor) -> bool:
        """Return whether the gates have a tensor's dtype and device."""
        return self._dtype == tensor.dtype and self._scales_C.device == tensor.device

    def of(self, slot: int) -> Tensor:
        """Return a layer's gates, `[G, width]`, in the stacks' dtype and on their device: `w s` at every rank."""
        unit, start, width = self._places[slot]
        view = self._views[unit]
        return view if view.shape[1] == width else view.narrow(1, start, width)

    def of_group(self, slot: int) -> Tensor:
        """Return the gates of all layers of a group, one layer's behind another's, by the slot of one of them."""
        return self._views[self._places[slot][0]]

    def fitted(self, x: Tensor, gate_GC: Tensor, layer: str) -> Tensor:
        """Return a layer's gates such that each is for as many rows of its input as every other.

        Args:
            x: the layer's input, `[..., I]`.
            gate_GC: what `of` or `of_group` returned.
            layer: its name.

        Raises:
            UsageError: if x is not of the rows, or the tokens, that the mixture is for.
        """
        if self.token_rows is not None:
            self._check_tokens(x, self.token_rows, layer)
            return gate_GC.index_select(0, self.token_rows.to(gate_GC.device).flatten())
        if self.rows_each is not None:
            self._check_rows(x, gate_GC.shape[0], self.rows_each, layer)
        return gate_GC

    def clear(self) -> None:
        """Let go of a product that no layer will take any more."""
        self.held = None

    def holds(self, weights: Mapping[str, float]) -> bool:
        """Return whether every weight, times its expert's scaling, fits into the stacks' dtype."""
        most = torch.finfo(self._dtype).max
        return all(abs(weight) * self._largest.get(expert, 0.0) <= most for expert, weight in weights.items())

    def check(self, weights_GE: Tensor, layered_GSE: Tensor | None = None) -> None:
        """Raise if a gate, a weight times an expert's scaling, does not fit into the stacks' dtype.

        Raises:
            UsageError: naming the expert.
        """
        if not self.experts:
            return
        weights_NE = weights_GE if layered_GSE is None else layered_GSE.flatten(0, 1)
        peaks_E = weights_NE.abs().amax(dim=0).double() * self._largest_E
        most = int(peaks_E.argmax())
        if not float(peaks_E[most]) <= torch.finfo(self._dtype).max:
            raise UsageError(
                f"the weight of {self.experts[most]!r} times its scaling is {float(peaks_E[most]):g}, beyond "
                f"{str(self._dtype).removeprefix('torch.')}",
                where=f"weights.{self.experts[most]}",
                mend="give a weight such as 0.6, or load the model in another dtype",
            )

    def set(self, weights_GE: Tensor, layered_GSE: Tensor | None = None) -> None:
        """Write every layer's gates in place.

        Args:
            weights_GE: float32 on the CPU, the experts in the order of `lay_out`.
            layered_GSE: as many for every layer, where weights differ between layers: takes the place of the others.
        """
        buffer_GC = self._buffer(weights_GE.shape[0])
        self._views = buffer_GC.split(self._widths, dim=1)
        device = self._scales_C.device
        if layered_GSE is None:
            spread_GC = weights_GE.to(device).index_select(1, self._columns_C)
        else:
            spread_GC = layered_GSE.to(device).flatten(1).index_select(1, self._layered_C)
            weights_GE = layered_GSE.abs().amax(dim=1)
        buffer_GC.copy_(spread_GC.mul_(self._scales_C))  # rounded to the stacks' dtype here, once
        is_used = (weights_GE != 0).any(dim=0).tolist()
        self.used = frozenset(name for name, one in zip(self.experts, is_used, strict=True) if one)

    def _check_tokens(self, x: Tensor, token_rows: Tensor, layer: str) -> None:
        is_flat = x.dim() < 3
        if x.shape[:-1] != (token_rows.flatten().shape if is_flat else token_rows.shape):
            raise UsageError(
                f"{layer} is given tokens of the shape {list(x.shape[:-1])}, rows has {list(token_rows.shape)}",
                where="rows",
                mend="give rows=... of the shape of input_ids",
            )

    def _check_rows(self, x: Tensor, num_gates: int, rows_each: int, layer: str) -> None:
        if x.dim() < 3:
            # laid out flat: a layer that sees some of the tokens alone cannot tell whose they are
            have, want = x.shape[0], self.num_tokens
            if have % num_gates == 0 and (have == want or torch.compiler.is_compiling()):
                return
            raise UsageError(
                f"{layer} is given {have} tokens laid out flat, the batch has {want}",
                where=layer,
                mend="run one profile at a time; a layer to which some of the tokens are sent can't be mixed",
            )
        if x.shape[0] != num_gates * rows_each:
            raise UsageError(
                f"the mixture is for {num_gates} prompts of {rows_each} rows each, the batch has {x.shape[0]} rows",
                where="profiles",
                mend="give one profile for each prompt; with beams or several answers a prompt, "
                "mixture(..., rows_each=N)",
            )

    def _buffer(self, num_gates: int) -> Tensor:
        capacity = 1 << (num_gates - 1).bit_length()
        if capacity not in self._buffers:
            with torch.inference_mode(False):
                self._buffers[capacity] = torch.zeros(
                    capacity, sum(self._widths), dtype=self._dtype, device=self._scales_C.device
                )
        return self._buffers[capacity][:num_gates]
