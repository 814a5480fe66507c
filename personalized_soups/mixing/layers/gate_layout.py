"""Which weight, and which factor, each column of the gates holds.

G gates, E experts of the model, S layers, C columns: the widths of all layers' stacks, concatenated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from personalized_soups.errors import UsageError
from personalized_soups.mixing.layers.stack import Stack


class Columns(NamedTuple):
    """The columns of one layer.

    Attributes:
        product: the index of the product that computes the layer.
        start: the layer's first column among the columns of that product.
        width: the number of the layer's columns.
    """

    product: int
    start: int
    width: int


class GateLayout:
    """The columns of the gates, fixed until experts or layers change.

    Attributes:
        experts: all experts of the model.
        widths: the number of columns of each product.
        dtype: of the stacks.
        device: of the stacks.

    Args:
        experts: all experts of the model.
        stacks: of the layers, in the order of their slots.
        products: the slots of the layers that each product computes; if left out, each layer has its own product.
    """

    def __init__(
        self, experts: Sequence[str], stacks: Sequence[Stack], products: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.experts = tuple(experts)
        # The layers of one product are neighbours, so that a group reads one view for all of them.
        order = [[slot] for slot in range(len(stacks))] if products is None else products
        self.widths = [sum(stacks[slot].width for slot in slots) for slots in order]
        self.dtype = stacks[0].a_CI.dtype if stacks else torch.float32
        self.device = stacks[0].a_CI.device if stacks else torch.device("cpu")
        self._columns: dict[int, Columns] = {}
        for product, slots in enumerate(order):
            start = 0
            for slot in slots:
                self._columns[slot] = Columns(product, start, stacks[slot].width)
                start += stacks[slot].width
        index = {expert: number for number, expert in enumerate(experts)}
        largest = dict.fromkeys(experts, 0.0)
        columns: list[int] = []
        layered: list[int] = []
        scales: list[float] = []
        # Built as lists: three tensors at the end are faster than one tensor for each layer.
        for slot in chain.from_iterable(order):
            stack = stacks[slot]
            own = [index[expert] for expert in stack.experts]
            for member, scale in stack.gate_columns():
                columns.append(own[member])
                # The position in a flattened [S, E] table, where weights differ between layers.
                layered.append(slot * len(experts) + own[member])
                scales.append(scale)
                largest[stack.experts[member]] = max(largest[stack.experts[member]], abs(scale))
        # The largest factor of each expert, in float64: checked against the dtype's range before any rounding.
        self._largest = largest
        self._largest_E = torch.tensor(list(largest.values()), dtype=torch.float64)
        with torch.inference_mode(False):  # a tensor made in inference mode cannot be changed outside of it
            self._columns_C = torch.tensor(columns, dtype=torch.int64, device=self.device)
            self._layered_C = torch.tensor(layered, dtype=torch.int64, device=self.device)
            # float32 until the product is rounded: a scaling such as 16 / 3 is inexact in 16 bits.
            self._scales_C = torch.tensor(scales, dtype=torch.float32, device=self.device)

    def columns_of(self, slot: int) -> Columns:
        """Return the columns of the layer with that slot."""
        return self._columns[slot]

    def spread(self, weights_GE: Tensor, layered_GSE: Tensor | None = None) -> Tensor:
        """Return the gates of all layers, `[G, C]`, float32 on the stacks' device: each weight times its factor.

        Args:
            weights_GE: float32 on the CPU, the experts in the order of `experts`.
            layered_GSE: weights for each layer, which replace `weights_GE`.
        """
        if layered_GSE is None:
            spread_GC = weights_GE.to(self.device).index_select(1, self._columns_C)
        else:
            spread_GC = layered_GSE.to(self.device).flatten(1).index_select(1, self._layered_C)
        return spread_GC.mul_(self._scales_C)

    def holds(self, weights: Mapping[str, float]) -> bool:
        """Return whether every weight, times its expert's scaling, fits into the stacks' dtype."""
        most = torch.finfo(self.dtype).max
        return all(abs(weight) * self._largest.get(expert, 0.0) <= most for expert, weight in weights.items())

    def check(self, weights_GE: Tensor, layered_GSE: Tensor | None = None) -> None:
        """Raise if a gate, a weight times its expert's scaling, does not fit into the stacks' dtype.

        Raises:
            UsageError: with the expert's name.
        """
        if not self.experts:
            return
        # The largest weight of an expert in any row and layer decides.
        weights_NE = weights_GE if layered_GSE is None else layered_GSE.flatten(0, 1)
        peaks_E = weights_NE.abs().amax(dim=0).double() * self._largest_E
        most = int(peaks_E.argmax())
        # `not <=` and not `>`: NaN must not pass.
        if not float(peaks_E[most]) <= torch.finfo(self.dtype).max:
            dtype = str(self.dtype).removeprefix("torch.")
            raise UsageError(
                f"the weight of {self.experts[most]!r} times its scaling is {float(peaks_E[most]):g}, beyond {dtype}",
                where=f"weights.{self.experts[most]}",
                mend="give a weight such as 0.6, or load the model in another dtype",
            )
