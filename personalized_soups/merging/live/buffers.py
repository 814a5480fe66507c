"""The buffers behind a live soup: laid out so that one product over one buffer sets every module at once.

E experts, K rank of the live adapter, O out features, I in features, P numbers in all A's (or all B's) of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.errors import UsageError
from personalized_soups.kernels.scale_columns import scale_columns
from personalized_soups.kernels.weighted_sums import weighted_sum
from personalized_soups.merging.planning.plan import PlannedModule
from personalized_soups.methods.factors import Factors

Shape = tuple[int, int]

# Rows of a RowSum are a multiple of this long: the kernel then reads and writes 16 bytes at a time.
_ROW_UNIT = 16


class Product(Protocol):
    """What is fixed (float32) times what a profile gives (float32), written into `live`, which never moves."""

    live: Tensor

    @property
    def widths(self) -> tuple[int, ...]:
        """How many numbers the product takes from each expert, all of them that expert's coefficient."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all of its tensors."""

    def run(self, coefficients: Tensor) -> None:
        """Write the product into `live`: computed in float32, rounded once where `live` is narrower."""

    def bound(self, coefficients: Sequence[float]) -> float:
        """Return a number that no magnitude in the product of one coefficient per expert exceeds."""


class RowSum:
    """`live_P = sum_e c_e experts_EP`; takes one number per expert.

    One kernel on a GPU, elsewhere a matrix-vector product: a matrix-matrix product may be computed in TF32 where the
    user has allowed it.
    """

    def __init__(self, experts_EP: Tensor, dtype: torch.dtype) -> None:
        num_experts, num_values = experts_EP.shape
        self.live = experts_EP.new_zeros(num_values, dtype=dtype)
        self.widths = (1,) * num_experts
        self._experts_EP = experts_EP
        self._experts_PE = experts_EP.T
        # no BLAS takes coefficients that are more exact than its matrix: it sums a 16-bit soup in float32 first
        has_scratch = dtype != torch.float32 and not experts_EP.is_cuda
        self._sum_P = torch.zeros_like(self.live, dtype=torch.float32) if has_scratch else None
        self._peaks: list[float] = torch.linalg.vector_norm(experts_EP, math.inf, dim=1).tolist()

    @property
    def num_bytes(self) -> int:
        """Bytes of all of its tensors."""
        return _num_bytes(self._experts_EP, self.live, *([] if self._sum_P is None else [self._sum_P]))

    def run(self, coefficients: Tensor) -> None:
        """Write the product into `live`."""
        if weighted_sum(coefficients, self._experts_EP, self.live):
            return
        sum_P = self.live if self.live.dtype == torch.float32 else self._sum_P
        if sum_P is None:
            # without a kernel, a GPU takes the memory anew each time from what torch has at hand
            sum_P = torch.empty_like(self.live, dtype=torch.float32)
        # not torch.mv: before torch 2.11 that allocates the whole result, whatever `out` says
        torch.addmv(sum_P, self._experts_PE, coefficients, beta=0, out=sum_P)
        if sum_P is not self.live:
            self.live.copy_(sum_P)

    def bound(self, coefficients: Sequence[float]) -> float:
        """Return a number that no magnitude in the product exceeds: the sum of the experts' largest."""
        return math.fsum(abs(c) * peak for c, peak in zip(coefficients, self._peaks, strict=True))


class ColumnScale:
    """`live_OK = pristine_OK * columns_K`: one elementwise product; takes each expert's number once per rank."""

    def __init__(self, pristine_OK: Tensor, ranks: Sequence[int], dtype: torch.dtype) -> None:
        self.live = torch.zeros_like(pristine_OK, dtype=dtype)
        self.widths = tuple(ranks)
        self._pristine_OK = pristine_OK
        # CUDA rounds to the output's dtype inside the kernel; on the CPU torch would allocate what is kept here
        direct = dtype == torch.float32 or pristine_OK.is_cuda
        self._scaled_OK = self.live if direct else torch.zeros_like(pristine_OK)
        peaks = torch.linalg.vector_norm(pristine_OK, math.inf, dim=0)
        self._peaks: list[float] = [part.max().item() for part in peaks.split(self.widths)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all of its tensors."""
        return _num_bytes(self._pristine_OK, self.live, self._scaled_OK)

    def run(self, coefficients: Tensor) -> None:
        """Write the product into `live`."""
        if scale_columns(self._pristine_OK, coefficients, self.live):
            return
        torch.mul(self._pristine_OK, coefficients, out=self._scaled_OK)
        if self._scaled_OK is not self.live:
            self.live.copy_(self._scaled_OK)

    def bound(self, coefficients: Sequence[float]) -> float:
        """Return the largest magnitude in the product."""
        return max(abs(c) * peak for c, peak in zip(coefficients, self._peaks, strict=True))


@dataclass(frozen=True, eq=False, slots=True)
class LiveBuffers:
    """A live soup: each module's `factors` (scaling 1; views), the products that set them, and by which numbers.

    `coefficients` takes the experts' weights and returns, for each product, one number per expert.
    """

    factors: Mapping[str, Factors]
    products: tuple[Product, ...]
    coefficients: Callable[[Sequence[float]], Sequence[Sequence[float]]]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class FactorRule:
    """A method that sums A's and B's apart: what of an expert's factors is fixed, and the weights' part of the rule."""

    a: Callable[[Factors], Tensor]
    b: Callable[[Factors], Tensor]
    coefficients: Callable[[Sequence[float]], Sequence[Sequence[float]]]


# The formulas of methods/factors.py, taken apart into what depends on the expert and what on the weights.
FACTOR_RULES: Mapping[str, FactorRule] = MappingProxyType({
    "factor_average": FactorRule(
        a=lambda each: each.a_RI,
        b=lambda each: each.b_OR.double() * each.scaling,
        coefficients=lambda weights: ([weight / math.fsum(weights) for weight in weights], weights),
    ),
    "factor_linear": FactorRule(
        a=lambda each: each.a_RI.double() * _signed_root(each.scaling),
        b=lambda each: each.b_OR.double() * abs(each.scaling) ** 0.5,
        coefficients=lambda weights: ([_signed_root(w) for w in weights], [abs(w) ** 0.5 for w in weights]),
    ),
})  # fmt: skip


def free_buffers(
    bank: ExpertBank, modules: Sequence[PlannedModule], dtype: torch.dtype, *, device: torch.device
) -> LiveBuffers:
    """Return `linear` of free experts: A is the experts' stack and stays; B's columns are scaled.

    Every module has the one rank K, so that the B's of all modules stand below one another in one buffer: an expert
    takes as many columns as its highest rank, zeros where it has a lower one or lacks the module. Scalings stand in B.

    Raises:
        InputError: where an expert holds NaN or infinity.
        UsageError: where an A does not fit into `dtype`.
    """
    ranks = [max(module.rank for module in expert.adapter.modules.values()) for expert in bank.experts]
    starts = list(accumulate(ranks, initial=0))
    heights = [module.out_features for module in modules]
    pristine_OK = torch.empty(sum(heights), starts[-1], device=device)
    a_stacks = [torch.zeros(starts[-1], module.in_features) for module in modules]
    for module, a_KI, part_OK in zip(modules, a_stacks, pristine_OK.split(heights), strict=True):
        b_OK = torch.zeros(module.out_features, starts[-1])
        for index in bank.members(module.name):
            each = bank.factors(index, module.name)
            columns = slice(starts[index], starts[index] + each.rank)
            a_KI[columns] = each.a_RI
            b_OK[:, columns] = each.b_OR.double() * each.scaling
        part_OK.copy_(b_OK)
    product = ColumnScale(pristine_OK, ranks, dtype)
    return _with_fixed_a(modules, a_stacks, product.live.split(heights), product)


def shared_buffers(
    bank: ExpertBank, modules: Sequence[PlannedModule], rank: int, dtype: torch.dtype, *, device: torch.device
) -> LiveBuffers:
    """Return `linear` of experts with one basis: A is theirs and stays; B is the sum of theirs, scalings included.

    Modules of a lower rank are padded with zeros, as in a merged adapter.

    Raises:
        InputError: where an expert holds NaN or infinity.
        UsageError: where an A does not fit into `dtype`.
    """
    shapes = _b_shapes(modules, rank)
    rows_EP = _expert_rows(bank, modules, shapes, lambda each: each.b_OR.double() * each.scaling, device)
    product = RowSum(rows_EP, dtype)
    a_stacks = [torch.zeros(rank, module.in_features) for module in modules]
    for module, a_KI in zip(modules, a_stacks, strict=True):
        each = bank.factors(0, module.name)
        a_KI[: each.rank] = each.a_RI
    return _with_fixed_a(modules, a_stacks, _views(product.live, shapes), product)


def factor_buffers(
    bank: ExpertBank,
    modules: Sequence[PlannedModule],
    rank: int,
    rule: FactorRule,
    dtype: torch.dtype,
    *,
    device: torch.device,
) -> LiveBuffers:
    """Return a method that sums A's and B's apart, each in a buffer and with coefficients of its own.

    Raises:
        InputError: where an expert holds NaN or infinity.
    """
    a_shapes, b_shapes = [(rank, module.in_features) for module in modules], _b_shapes(modules, rank)
    a_product = RowSum(_expert_rows(bank, modules, a_shapes, rule.a, device), dtype)
    b_product = RowSum(_expert_rows(bank, modules, b_shapes, rule.b, device), dtype)
    pairs = zip(_views(a_product.live, a_shapes), _views(b_product.live, b_shapes), strict=True)
    factors = {module.name: Factors(a_KI, b_OK) for module, (a_KI, b_OK) in zip(modules, pairs, strict=True)}
    num_bytes = a_product.num_bytes + b_product.num_bytes
    return LiveBuffers(factors, (a_product, b_product), rule.coefficients, num_bytes)


def check_fits(largest: float, dtype: torch.dtype) -> None:
    """Raise if a soup whose magnitudes reach `largest` may leave `dtype`.

    Raises:
        UsageError: naming both.
    """
    if not largest <= torch.finfo(dtype).max:
        raise UsageError(
            f"the soup has values up to {largest:g}, beyond {str(dtype).removeprefix('torch.')}",
            where="dtype",
            mend="take dtype float32 or bfloat16, or smaller weights",
        )


def _with_fixed_a(
    modules: Sequence[PlannedModule], a_stacks: Sequence[Tensor], b_views: Sequence[Tensor], product: Product
) -> LiveBuffers:
    for a_KI in a_stacks:
        check_fits(a_KI.abs().max().item(), product.live.dtype)
    rounded = [a_KI.to(product.live.dtype).to(product.live.device) for a_KI in a_stacks]
    factors = {module.name: Factors(a_KI, b_OK) for module, a_KI, b_OK in zip(modules, rounded, b_views, strict=True)}
    return LiveBuffers(factors, (product,), lambda weights: (weights,), product.num_bytes + _num_bytes(*rounded))


def _expert_rows(
    bank: ExpertBank,
    modules: Sequence[PlannedModule],
    shapes: Sequence[Shape],
    part: Callable[[Factors], Tensor],
    device: torch.device,
) -> Tensor:
    """Return experts_EP in float32: one row an expert, that part of its factors; zeros where it has none.

    Zeros behind them make the rows' length a multiple of _ROW_UNIT.
    """
    num_values = sum(map(math.prod, shapes))
    rows_EP = torch.zeros(len(bank.experts), num_values + -num_values % _ROW_UNIT, device=device)
    for index, expert in enumerate(bank.experts):
        # put together on the CPU: a GPU gets a row at once and not each module by itself
        row_P = rows_EP[index] if device.type == "cpu" else torch.zeros(rows_EP.shape[1])
        for module, target in zip(modules, _views(row_P, shapes), strict=True):
            if module.name in expert.adapter.modules:
                values = part(bank.factors(index, module.name))
                target[: values.shape[0], : values.shape[1]] = values
        if device.type != "cpu":
            rows_EP[index] = row_P
    return rows_EP


def _views(values_P: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Return a vector's first parts, one behind the other, as matrices of these shapes; they share its memory."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = values_P[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _b_shapes(modules: Sequence[PlannedModule], rank: int) -> list[Shape]:
    return [(module.out_features, rank) for module in modules]


def _signed_root(value: float) -> float:
    return math.copysign(abs(value) ** 0.5, value)


def _num_bytes(*tensors: Tensor) -> int:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
