"""The gates of the batch that is running: by how much each of its rows weighs every stacked rank of every layer.

G gates, E experts of the model, S layers, C columns: the widths of all layers' stacks, one after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from personalized_soups.errors import UsageError
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
    """

    def __init__(self) -> None:
        self.is_on = False
        self.rows_each: int | None = None
        self.used: frozenset[str] = frozenset()
        self.token_rows: Tensor | None = None
        self.num_tokens = 0
        self._views: tuple[Tensor, ...] = ()
        self._buffers: dict[int, Tensor] = {}
        self.lay_out((), ())

    def lay_out(self, experts: Sequence[str], stacks: Sequence[Stack]) -> None:
        """Take the layers' stacks, in the order of their slots, and forget the buffers of others."""
        self.experts = tuple(experts)
        self._widths = [stack.width for stack in stacks]
        place = {expert: index for index, expert in enumerate(experts)}
        largest = dict.fromkeys(experts, 0.0)
        columns: list[int] = []
        layered: list[int] = []
        scales: list[float] = []
        for slot, stack in enumerate(stacks):
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
        return self._views[slot]

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

    def _buffer(self, num_gates: int) -> Tensor:
        capacity = 1 << (num_gates - 1).bit_length()
        if capacity not in self._buffers:
            with torch.inference_mode(False):
                self._buffers[capacity] = torch.zeros(
                    capacity, sum(self._widths), dtype=self._dtype, device=self._scales_C.device
                )
        return self._buffers[capacity][:num_gates]
