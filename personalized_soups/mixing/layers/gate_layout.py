"""The layout of the gates: which weight and which scaling each column holds.

Shapes: G = gates, E = experts of the model, S = wrapped layers, C = columns of all layers' stacks together,
N = G, or G * S where weights differ by layer; in `a_CI`, C = rows of one layer's A's and I = in_features.
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
    """The columns of one layer's gates.

    Attributes:
        product: the index of the product that computes the layer.
        start: the number of the layer's first column, counted within the product.
        width: the number of columns of the layer.
    """

    product: int
    start: int
    width: int


class GateLayout:
    """The columns of the gates. They stay the same until experts or layers change.

    A matrix product is computed for one layer, or for all layers of a group. The columns of its layers are contiguous.

    Attributes:
        experts: the names of all experts of the model.
        widths: the number of columns of each product.
        dtype: the dtype of the stacks.
        device: the device of the stacks.

    Args:
        experts: the names of all experts of the model.
        stacks: the stacks of the layers, in the order of the layers' slots.
        products: for each product, the slots of the layers that it computes. If left out, each layer has its own
            product.
    """

    def __init__(
        self, experts: Sequence[str], stacks: Sequence[Stack], products: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.experts = tuple(experts)
        # The columns of one product are contiguous, so that a group reads them as one view.
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
        # Lists are built first, because three tensors at the end are faster than one tensor for each layer.
        for slot in chain.from_iterable(order):
            stack = stacks[slot]
            own = [index[expert] for expert in stack.experts]
            for member, scale in stack.gate_columns():
                columns.append(own[member])
                # The position in the flattened [S, E] table, which is used if weights differ between layers.
                layered.append(slot * len(experts) + own[member])
                scales.append(scale)
                largest[stack.experts[member]] = max(largest[stack.experts[member]], abs(scale))
        # The largest absolute scaling of each expert. In float64, products with weights cannot overflow before `check`
        # compares them with the dtype's range.
        self._largest = largest
        self._largest_E = torch.tensor(list(largest.values()), dtype=torch.float64)
        with torch.inference_mode(False):  # a tensor created in inference mode cannot be changed outside of it
            self._columns_C = torch.tensor(columns, dtype=torch.int64, device=self.device)
            self._layered_C = torch.tensor(layered, dtype=torch.int64, device=self.device)
            # Scalings stay in float32 until their products are rounded, because 16 / 3, for example, is inexact in 16
            # bits.
            self._scales_C = torch.tensor(scales, dtype=torch.float32, device=self.device)

    def columns_of(self, slot: int) -> Columns:
        """Return the columns of the layer with that slot."""
        return self._columns[slot]

    def spread(self, weights_GE: Tensor, layered_GSE: Tensor | None = None) -> Tensor:
        """Return the gates of all layers, `[G, C]`, in float32 on the stacks' device.

        Each entry is the weight of the column's expert times the scaling of the column.

        Args:
            weights_GE: the weights as a float32 tensor on the CPU, with the experts in the order of `experts`.
            layered_GSE: the weights for each layer. If given, it is used instead of `weights_GE`.
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
        """Check that every weight times its expert's scaling fits into the stacks' dtype.

        Raises:
            UsageError: if a product is too large or NaN. The error names the expert.
        """
        if not self.experts:
            return
        # Only the largest absolute weight of each expert, over all gates and layers, must be checked.
        weights_NE = weights_GE if layered_GSE is None else layered_GSE.flatten(0, 1)
        peaks_E = weights_NE.abs().amax(dim=0).double() * self._largest_E
        most = int(peaks_E.argmax())
        # `not ... <=` is also true for NaN, but `>` would be false.
        if not float(peaks_E[most]) <= torch.finfo(self.dtype).max:
            dtype = str(self.dtype).removeprefix("torch.")
            raise UsageError(
                f"the weight of {self.experts[most]!r} times the expert's scaling is {float(peaks_E[most]):g}, but "
                f"{dtype} holds at most {torch.finfo(self.dtype).max:g}",
                where=f"weights.{self.experts[most]}",
                mend="give a smaller weight, such as 0.6, or load the model in a dtype with a larger range, such as "
                "dtype='bfloat16'",
            )
