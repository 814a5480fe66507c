"""One layer's stack: the factors of every expert that adapts it, side by side and without weights.

E experts of the layer, R rank of one expert, K sum of ranks, C rows of the distinct A's, I in features, O out features.
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

# Leaving out an expert that nobody uses saves reading its factors and costs three more operations where it parts the
# stack: below so many numbers between two used experts, the whole is one span. The CPU's was measured on two cores at
# 16 rows; a GPU reads so many numbers of 16 bits in the 5 microseconds that two launches take.
_WORTH_A_GAP = 1 << 17
_WORTH_A_GAP_ON_GPU = 1 << 23


@dataclass(frozen=True, eq=False, slots=True)
class Member:
    """What one expert has at a layer.

    `gain_O` is DoRA's D - 1 (B is D B then), `bias_O` the bias of a lora_bias, to which the scaling applies.
    """

    expert: str
    factors: Factors
    gain_O: Tensor | None = None  # noqa: N815
    bias_O: Tensor | None = None  # noqa: N815


@dataclass(frozen=True, eq=False, slots=True)
class Span:
    """Neighbouring ranks of a stack that are computed at once: gate columns `start` to `stop`, views of the factors."""

    start: int
    stop: int
    a_CI: Tensor  # noqa: N815
    factors: BlockDiagonal


@dataclass(frozen=True, eq=False, slots=True)
class Stack:
    """The stacked factors of a layer's experts, as `mixing.arithmetic.mixed` multiplies them.

    An A that several experts share stands once: `columns_K` says which row of `a_CI` each rank has. B's hold no
    scalings (but DoRA's D): those stand in the gates. `gains_DO` and `biases_DO` have a row for each expert that has
    one, `gained` and `biased` say for which.
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
        """Return the stack of a layer's experts, new tensors; A's that are equal in `dtype` stand once."""
        ranks = tuple(each.factors.rank for each in members)
        first = members[0].factors
        b_KO = torch.empty(sum(ranks), first.b_OR.shape[0], dtype=dtype, device=device)
        for part, each in zip(b_KO.split(ranks), members, strict=True):
            part.copy_(each.factors.b_OR.T)
        basis = group_numbers([each.factors.a_RI for each in members], partial(_are_equal, dtype=dtype))
        rows = SharedRows.of(basis, ranks)
        distinct = [members[index].factors.a_RI for index in rows.firsts]
        a_CI = torch.empty(sum(map(len, distinct)), first.a_RI.shape[1], dtype=dtype, device=device)
        for part, a_RI in zip(a_CI.split([len(a_RI) for a_RI in distinct]), distinct, strict=True):
            part.copy_(a_RI)
        columns_K = torch.tensor(rows.row_K, device=device) if len(distinct) < len(members) else None
        gained = tuple(index for index, each in enumerate(members) if each.gain_O is not None)
        biased = tuple(index for index, each in enumerate(members) if each.bias_O is not None)
        return cls(
            experts=tuple(each.expert for each in members),
            ranks=ranks,
            scalings=tuple(each.factors.scaling for each in members),
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
        """Columns of the layer's gate: one for each rank, then one for each gain, then one for each bias."""
        return sum(self.ranks) + len(self.gained) + len(self.biased)

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        tensors = (self.a_CI, self.b_KO, self.columns_K, self.gains_DO, self.biases_DO)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def gate_columns(self) -> Iterator[tuple[int, float]]:
        """Yield, for each column of the gate, the expert whose weight it holds and by what that is multiplied."""
        for index, (rank, scaling) in enumerate(zip(self.ranks, self.scalings, strict=True)):
            yield from [(index, scaling)] * rank
        for index in self.gained:
            yield index, 1.0
        for index in self.biased:
            yield index, self.scalings[index]

    def members(self) -> list[Member]:
        """Return what each expert has here, views of the stack: what another stack is made of."""
        found = []
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
            found.append(Member(expert, Factors(self.a_CI[rows], self.b_KO[start:stop].T, scaling), gain, bias))
            start = stop
        return found

    def moved(self, dtype: torch.dtype, device: torch.device) -> Stack:
        """Return the stack in another dtype or on another device; itself where it is there already."""
        if (self.a_CI.dtype, self.a_CI.device) == (dtype, device):
            return self
        return Stack.of(self.members(), dtype, device)

    def whole(self) -> Span:
        """Return all ranks as one span."""
        return Span(0, sum(self.ranks), self.a_CI, BlockDiagonal.of([self.b_KO], [0], self.columns_K))

    def spans(self, used: Collection[str]) -> tuple[Span, ...]:
        """Return the spans that hold the experts in `used`; others are left out where that is worth it. No copies."""
        runs: list[list[int]] = []
        start = 0
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
        first, last = _bounds(columns_K)
        return Span(start, stop, self.a_CI[first:last], BlockDiagonal.of([b_KO], [0], columns_K - first))


def _rows(vectors: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    found = [vector.to(device, dtype) for vector in vectors if vector is not None]
    return torch.stack(found) if found else None


def _are_equal(one: Tensor, other: Tensor, *, dtype: torch.dtype) -> bool:
    """Return whether two A's are equal in `dtype`; different float32 values may be one 16-bit value."""
    if one.shape != other.shape or one.device != other.device:
        return False
    # freely trained experts differ in their first row already
    return all(torch.equal(one[rows].to(dtype), other[rows].to(dtype)) for rows in (slice(1), slice(None)))


def _bounds(columns_K: Tensor) -> tuple[int, int]:
    return int(columns_K.min()), int(columns_K.max()) + 1
