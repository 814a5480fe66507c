"""One layer's stack: the concatenated factors of all experts that adapt the layer, not multiplied by any weights.

Shapes: R = rank of one expert, K = sum of the ranks of all experts, C = rows of the distinct A's, D = experts with a
gain or a bias, N = rows of the input, I = in_features, O = out_features.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from personalized_soups.kernels.add_gated import BlockDiagonal
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.shared_a import SharedRows, group_numbers

# If unused experts lie between two used experts, skipping their factors saves time for reading them, but needs a second
# span, which costs three more operations. If the factors have fewer elements than these limits, they are not skipped.
# The limit for CPUs was measured on two cores with 16 rows. A GPU reads as many elements as its limit, of 16 bits each,
# in the 5 microseconds that two kernel launches take.
_WORTH_A_GAP = 1 << 17
_WORTH_A_GAP_ON_GPU = 1 << 23


@dataclass(frozen=True, eq=False, slots=True)
class Member:
    """The tensors of one expert at a layer.

    Attributes:
        expert: the expert's name.
        factors: A, B and scaling. With DoRA, B is already multiplied by D.
        gain_O: DoRA's D - 1, where D scales each output of the layer; None without DoRA.
        bias_O: the bias of B's layer (lora_bias), not yet multiplied by the scaling; None without lora_bias.
    """

    expert: str
    factors: Factors
    gain_O: Tensor | None = None  # noqa: N815
    bias_O: Tensor | None = None  # noqa: N815


@dataclass(frozen=True, eq=False, slots=True)
class Span:
    """Contiguous ranks of a stack that are computed at once.

    Attributes:
        start: the first of the span's columns among those of the layer's gates.
        stop: the column after the span's last column.
        a_CI: the A's of the span, as a view of the stack's tensor.
        factors: the B's of the span, as views of the stack's tensor.
    """

    start: int
    stop: int
    a_CI: Tensor  # noqa: N815
    factors: BlockDiagonal


@dataclass(frozen=True, eq=False, slots=True)
class Stack:
    """The stacked factors of a layer's experts, which `mixing.layers.arithmetic.mixed` multiplies with the input.

    Attributes:
        experts: the names of the experts that adapt the layer.
        ranks: the rank of each expert.
        scalings: the scaling of each expert. The B's are not multiplied by the scalings, because the gates are.
        a_CI: the A's of all experts. An A that several experts share occurs once.
        b_KO: the transposed B's of all experts. With DoRA, they are multiplied by D.
        columns_K: for each rank, the row of `a_CI` that belongs to it; None if rank k has row k.
        gained: the indices of the experts with DoRA.
        gains_DO: DoRA's D - 1, with one row for each of `gained`; None without DoRA.
        biased: the indices of the experts with a lora_bias.
        biases_DO: the biases, with one row for each of `biased`; None without lora_bias.
    """

    experts: tuple[str, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    a_CI: Tensor  # noqa: N815
    b_KO: Tensor  # noqa: N815
    columns_K: Tensor | None  # noqa: N815
    gained: tuple[int, ...]
    gains_DO: Tensor | None  # noqa: N815
    biased: tuple[int, ...]
    biases_DO: Tensor | None  # noqa: N815

    @classmethod
    def of(cls, members: Sequence[Member], dtype: torch.dtype, device: torch.device) -> Stack:
        """Return a stack of copies of the members' tensors. A's that are equal in `dtype` are stored once."""
        ranks = tuple(member.factors.rank for member in members)
        first = members[0].factors
        # B is stored transposed, so that the product of an [N, K] tensor with it reads whole rows.
        b_KO = torch.empty(sum(ranks), first.b_OR.shape[0], dtype=dtype, device=device)
        for part, member in zip(b_KO.split(ranks), members, strict=True):
            part.copy_(member.factors.b_OR.T)
        # Experts that were trained on a shared basis have the same A, which is stored and multiplied once.
        basis = group_numbers([member.factors.a_RI for member in members], partial(_are_equal, dtype=dtype))
        rows = SharedRows.of(basis, ranks)
        distinct = [members[index].factors.a_RI for index in rows.firsts]
        a_CI = torch.empty(sum(map(len, distinct)), first.a_RI.shape[1], dtype=dtype, device=device)
        for part, a_RI in zip(a_CI.split([len(a_RI) for a_RI in distinct]), distinct, strict=True):
            part.copy_(a_RI)
        # If every expert has its own A, `columns_K` is None, and the kernel needs no look-up.
        columns_K = torch.tensor(rows.row_K, device=device) if len(distinct) < len(members) else None
        gained = tuple(index for index, member in enumerate(members) if member.gain_O is not None)
        biased = tuple(index for index, member in enumerate(members) if member.bias_O is not None)
        return cls(
            experts=tuple(member.expert for member in members),
            ranks=ranks,
            scalings=tuple(member.factors.scaling for member in members),
            a_CI=a_CI,
            b_KO=b_KO,
            columns_K=columns_K,
            gained=gained,
            gains_DO=_rows([members[index].gain_O for index in gained], dtype, device),
            biased=biased,
            biases_DO=_rows([members[index].bias_O for index in biased], dtype, device),
        )

    @property
    def width(self) -> int:
        """The number of columns of the layer's gates: one for each rank, one for each gain and one for each bias."""
        return sum(self.ranks) + len(self.gained) + len(self.biased)

    @property
    def num_bytes(self) -> int:
        """The size of all tensors in bytes."""
        tensors = (self.a_CI, self.b_KO, self.columns_K, self.gains_DO, self.biases_DO)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def gate_columns(self) -> Iterator[tuple[int, float]]:
        """Yield, for each column of the layer's gates, the expert's index and the factor of the expert's weight.

        The columns are those of all ranks, then those of all gains, then those of all biases.
        """
        for index, (rank, scaling) in enumerate(zip(self.ranks, self.scalings, strict=True)):
            yield from [(index, scaling)] * rank
        # D - 1 is not a part of the delta, so it is not multiplied by the scaling.
        for index in self.gained:
            yield index, 1.0
        for index in self.biased:
            yield index, self.scalings[index]

    def members(self) -> list[Member]:
        """Return the tensors of each expert, as views of the stack. Another stack can be made of them."""
        members = []
        start = 0
        for index, (expert, rank, scaling) in enumerate(zip(self.experts, self.ranks, self.scalings, strict=True)):
            stop = start + rank
            rows = slice(start, stop) if self.columns_K is None else slice(*_bounds(self.columns_K[start:stop]))
            gain = (
                self.gains_DO[self.gained.index(index)] if self.gains_DO is not None and index in self.gained else None
            )
            bias = (
                self.biases_DO[self.biased.index(index)]
                if self.biases_DO is not None and index in self.biased
                else None
            )
            members.append(Member(expert, Factors(self.a_CI[rows], self.b_KO[start:stop].T, scaling), gain, bias))
            start = stop
        return members

    def moved(self, dtype: torch.dtype, device: torch.device) -> Stack:
        """Return a copy of the stack with this dtype and device. If the stack has them already, return the stack."""
        if (self.a_CI.dtype, self.a_CI.device) == (dtype, device):
            return self
        # The stack is built again, because A's that differ in float32 may be equal in 16 bits and are then stored once.
        return Stack.of(self.members(), dtype, device)

    def whole(self) -> Span:
        """Return one span of all ranks."""
        return Span(0, sum(self.ranks), self.a_CI, BlockDiagonal.of([self.b_KO], [0], self.columns_K))

    def spans(self, used: Collection[str]) -> tuple[Span, ...]:
        """Return spans that contain the experts in `used`, as views. Unused experts are left out if that saves time."""
        runs: list[list[int]] = []  # start and stop of each span
        start = 0
        # The number of elements for each rank: a row of A and a row of the transposed B.
        row_numbers = self.a_CI.shape[1] + self.b_KO.shape[1]
        worth_a_gap = _WORTH_A_GAP_ON_GPU if self.a_CI.is_cuda else _WORTH_A_GAP
        for expert, rank in zip(self.experts, self.ranks, strict=True):
            if expert in used:
                if runs and (start - runs[-1][1]) * row_numbers < worth_a_gap:
                    runs[-1][1] = start + rank
                else:
                    runs.append([start, start + rank])
            start += rank
        if runs == [[0, start]]:
            return (self.whole(),)
        return tuple(self._span(*run) for run in runs)

    def _span(self, start: int, stop: int) -> Span:
        b_KO = self.b_KO[start:stop]
        if self.columns_K is None:
            return Span(start, stop, self.a_CI[start:stop], BlockDiagonal.of([b_KO], [0]))
        columns_K = self.columns_K[start:stop]
        # The span contains only the A's that its own ranks use.
        first, last = _bounds(columns_K)
        return Span(start, stop, self.a_CI[first:last], BlockDiagonal.of([b_KO], [0], columns_K - first))


def _rows(vectors: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    rows = [vector.to(device, dtype) for vector in vectors if vector is not None]
    return torch.stack(rows) if rows else None


def _are_equal(left: Tensor, right: Tensor, *, dtype: torch.dtype) -> bool:
    """Return whether two A's are equal after a cast to `dtype`. Different values may be equal in 16 bits."""
    if left.shape != right.shape or left.device != right.device:
        return False
    # The first rows are compared first, because the A's of experts without a shared basis already differ there.
    return all(torch.equal(left[rows].to(dtype), right[rows].to(dtype)) for rows in (slice(1), slice(None)))


def _bounds(columns_K: Tensor) -> tuple[int, int]:
    """Return the first row of `a_CI` that the given ranks use, and the row after the last row that they use."""
    return int(columns_K.min()), int(columns_K.max()) + 1
